"""Answers as they come, in a file that a killed run leaves whole and its successor reads.

One line per batch, written and synced at once. A line that was cut by the kill is dropped.
"""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """The answers so far of one run, by row number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, dict[str, Any]]:
        """Return what is kept, and cut off what is not whole."""
        if not self.path.is_file():
            return {}
        answers: dict[int, dict[str, Any]] = {}
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.truncate(self.path, whole)
        for line in raw[:whole].splitlines():
            answers |= {int(row): answer for row, answer in json.loads(line).items()}
        return answers

    def append(self, answers: dict[int, dict[str, Any]]) -> None:
        """Add the answers of a batch: all of them, or, after a kill, none.

        Raises:
            OSError: If they cannot be written, e.g. because the disk is full.
        """
        line = json.dumps(answers, ensure_ascii=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            written = file.write(line.encode())
            if written != len(line.encode()):
                raise OSError(28, "no space left on device", str(self.path))
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)
