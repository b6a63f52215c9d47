"""A run's record while it grows: the events that came since one last looked."""

import json
from pathlib import Path

from fedfora.reporting.history import Event


class Follower:
    """Reads metrics.jsonl on from where it stopped; a shorter file is read anew."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / "metrics.jsonl"
        self.position = 0

    def new(self) -> list[Event]:
        """Return the events since the last call; half a line waits for its other half."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self.position:  # overwritten, or cut at a resumption
                self.position = 0
            file.seek(self.position)
            read = file.read()
        whole = read[: read.rfind(b"\n") + 1]
        self.position += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
