"""A run directory read back: what was run, where, and what has come out so far.

Every file may be missing, and a run in progress may have written half of its last line: the reader
gets what is there.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
            f"RUN {directory} is not a run directory: it holds none of {', '.join(FILES)}"
        )
    events = read_lines(directory / "metrics.jsonl")
    for number, event in enumerate(events, start=1):
        if not isinstance(event.get("event"), str):
            raise ValueError(f"{directory / 'metrics.jsonl'}, line {number}: not an event")
    return Run(
        directory=directory,
        config=_mapping(directory / "config.yaml"),
        environment=_mapping(directory / "environment.json"),
        events=events,
        scores=_mapping(directory / "scores.json"),
        predictions=read_lines(directory / "predictions.jsonl"),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file; none if there is no file.

    A last line without its line break is still being written and is left out.

    Raises:
        ValueError: Naming file and line, if another line is no JSON object.
    """
    if not path.is_file():
        return []
    objects = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: not an object")
        objects.append(value)
    return objects


def _mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; an empty one if there is no file."""
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

    A resumed run cuts off what came after its checkpoint, and a new run in the same
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
            while self._read:
                start, (end, known) = self._end(-2), self._read[-1]
                file.seek(start)
                if hash(file.read(end - start)) == known:  # it is where it was
                    break
                self._read.pop()
            file.seek(self._end(-1))
            fresh = file.read()
        lines = fresh[: fresh.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            self._read.append((self._end(-1) + len(line), hash(line)))
        return [json.loads(line) for line in lines]

    def _end(self, index: int) -> int:
        """Return where a line ends, counted from the last one; 0 before the first."""
        return self._read[index][0] if len(self._read) >= -index else 0


# Events to curves: every number that a run recorded more than once, by name. Nothing is known here
# of what a run may measure: a number that a rule, a mechanism or a screen adds to its round's line
# gets its curve by being there.

Points = list[tuple[float, float]]  # whole numbers stay integers: they are shown as such

# They say where a line stands, not what was measured.
_PLACES = {"round", "step", "seconds", "time"}
# Bounds and breakdowns of scores; tables show them, curves would drown in them.
_NOT_CURVES = {"intervals", "relation_f1", "relations", "rows", "groups"}


@dataclass(frozen=True)
class Curves:
    """The curves of a run.

    Args:
        axis: What x counts: "round" or "step".
        of: Measurement to its points, by site; those of the run as a whole are under "".
    """

    axis: str
    of: dict[str, dict[str, Points]] = field(default_factory=dict)


def curves_of(events: Iterable[Event]) -> Curves:
    """Return the curves of the "round" events or, where there are none, of the "step" events."""
    events = list(events)
    axis = "round" if any(line.get("event") == "round" for line in events) else "step"
    curves = Curves(axis)
    for line in events:
        if line.get("event") != axis or axis not in line:
            continue
        numbers = [("", *pair) for pair in _numbers(line, _PLACES | _NOT_CURVES)]
        for site in sites_of(line):
            numbers += [(str(site["site"]), *pair) for pair in _numbers(site, _NOT_CURVES)]
        for group, scores in (line.get("groups") or {}).items():
            numbers += [(group, f"own_{n}", value) for n, value in _numbers(scores, _NOT_CURVES)]
        for owner, name, value in numbers:
            points = curves.of.setdefault(name, {}).setdefault(owner, [])
            points.append((float(line[axis]), value))
    return curves


def sites_of(line: Event) -> list[dict[str, Any]]:
    """Return what a round's line says of each site that took part."""
    sites = line.get("sites")
    if not isinstance(sites, list):
        return []
    return [site for site in sites if isinstance(site, dict) and "site" in site]


def is_constant(points: Points) -> bool:
    """Say whether there is nothing to draw: one value, once or all along."""
    return len({value for _, value in points}) < 2


def _numbers(
    mapping: Mapping[str, Any], without: set[str], prefix: str = ""
) -> Iterable[tuple[str, float]]:
    """Yield the names and values of the numbers in a mapping and in the mappings in it."""
    for name, value in mapping.items():
        if name in without or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _numbers(value, _NOT_CURVES, f"{prefix}{name}.")
