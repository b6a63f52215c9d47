"""A run's record while it grows: the events that came since one last looked."""

import json
from pathlib import Path
from typing import BinaryIO

from fedfora.reporting.history import Event


class Follower:
    """Reads metrics.jsonl on from where it stopped.

    A run that is gone on with cuts off what came after its checkpoint, and a new run in the same
    directory begins with an empty file: only lines that have not been handed out come again.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / "metrics.jsonl"
        self._read: list[tuple[int, int]] = []  # of each line: where it ends, and its hash

    def new(self) -> list[Event]:
        """Return the events since the last call; half a line waits for its other half."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            while self._read and not self._still_there(file):
                self._read.pop()
            file.seek(self._end(-1))
            fresh = file.read()
        lines = fresh[: fresh.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            self._read.append((self._end(-1) + len(line), hash(line)))
        return [json.loads(line) for line in lines]

    def _still_there(self, file: BinaryIO) -> bool:
        """Say whether the last line that was handed out is where it was."""
        start = self._end(-2)
        end, known = self._read[-1]
        file.seek(start)
        return hash(file.read(end - start)) == known

    def _end(self, index: int) -> int:
        """Return where a line ends, counted from the last one; 0 before the first."""
        return self._read[index][0] if len(self._read) >= -index else 0
