"""Events to curves: every number that a run recorded more than once, by name.

Nothing is known here of what a run may measure. A number that a rule, a mechanism or a screen adds
to its round's line gets its curve by being there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedfora.reporting.record import Event

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
