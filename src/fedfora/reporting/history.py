"""A run directory read back: what was run, where, and what has come out so far.

Every file may be missing, and a run in progress may have written half of its last line: the reader
gets what is there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedfora.config import read_yaml
from fedfora.reporting.record import METRICS, Event

FILES = ("config.yaml", "metrics.jsonl", "scores.json", "predictions.jsonl")


@dataclass(frozen=True)
class Run:
    """One run, as its directory tells it.

    Args:
        directory: Where it was read.
        config: The resolved settings by section; empty where there are none.
        environment: Versions, hardware, seed and fingerprints.
        events: The lines of metrics.jsonl.
        scores: The scores of a prediction run.
        predictions: The answered rows: `input`, `reference`, `prediction`.
    """

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    events: list[Event]
    scores: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.resolve().name

    def of(self, event: str) -> list[Event]:
        """Return the events of one kind, e.g. "round"."""
        return [line for line in self.events if line.get("event") == event]

    def setting(self, section: str, name: str) -> Any:
        """Return a setting, or None where the run has none of that name."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, Mapping) else None


def read_run(directory: str | Path) -> Run:
    """Read a run directory.

    Raises:
        ValueError: If it holds no run, or a file in it is broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"RUN {directory}: no such directory")
    if not any((directory / name).is_file() for name in FILES):
        raise ValueError(
            f"RUN {directory} is no run directory: it holds none of {', '.join(FILES)}"
        )
    events = read_lines(directory / "metrics.jsonl")
    for number, event in enumerate(events, start=1):
        if not isinstance(event.get("event"), str):
            raise ValueError(f"{directory / 'metrics.jsonl'}, line {number}: no event")
    return Run(
        directory=directory,
        config=_mapping(directory / "config.yaml"),
        environment=_mapping(directory / "environment.json"),
        events=events,
        scores=_mapping(directory / "scores.json"),
        predictions=read_lines(directory / "predictions.jsonl"),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file; none where there is no file.

    A last line without its line break is still being written and is left out.

    Raises:
        ValueError: Naming file and line, if another line is no JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: not an object")
        objects.append(value)
    return objects


def _mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        is_json = path.suffix == ".json"
        value = json.loads(path.read_text(encoding="utf-8")) if is_json else read_yaml(path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a mapping")
    return value


class Follower:
    """A run's record while it grows: reads metrics.jsonl, or what passes by, from where it stopped.

    A run that is resumed cuts off what came after its checkpoint, and a new run in the same
    directory begins with an empty file: only lines that have not been handed out come again.
    """

    def __init__(self, directory: str | Path, file: str = METRICS) -> None:
        self.path = Path(directory) / file
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
