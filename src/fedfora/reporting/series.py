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
        whole: Measurement to its points, for the run as a whole.
        sites: Measurement to site to its points.
    """

    axis: str
    whole: dict[str, Points] = field(default_factory=dict)
    sites: dict[str, dict[str, Points]] = field(default_factory=dict)


def curves_of(events: Iterable[Event]) -> Curves:
    """Return the curves of the "round" events or, where there are none, of the "step" events."""
    events = list(events)
    axis = "round" if any(line.get("event") == "round" for line in events) else "step"
    curves = Curves(axis)
    for line in events:
        if line.get("event") != axis or axis not in line:
            continue
        position = float(line[axis])
        for name, value in _numbers(line, _PLACES | _NOT_CURVES):
            curves.whole.setdefault(name, []).append((position, value))
        for site in sites_of(line):
            for name, value in _numbers(site, _NOT_CURVES):
                by_site = curves.sites.setdefault(name, {})
                by_site.setdefault(str(site["site"]), []).append((position, value))
        for group, scores in (line.get("groups") or {}).items():
            for name, value in _numbers(scores, _NOT_CURVES):
                curves.sites.setdefault(f"own_{name}", {}).setdefault(group, []).append(
                    (position, value)
                )
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
