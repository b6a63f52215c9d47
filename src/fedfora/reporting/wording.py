"""Names, numbers and events of the record to what a person reads."""

import math
from collections.abc import Mapping
from typing import Any

from fedfora.metrics import METRICS, headlines, in_order
from fedfora.registry import counted, printable

_LABELS = {
    "loss": "training loss",
    "scores": "scores on held-out rows",
    "validation_loss": "validation loss",
    "received_validation_loss": "validation loss of the received adapter",
    "norm": "update norm",
    "attainable_error": "lowest possible aggregation error at this rank",
    "aggregation_error_of_step": "aggregation error of the round's change",
    "largest_error": "largest rounding error of the masked mean",
    "weight": "weight of all sites",
    "uplink_bytes": "upload per round",
    "downlink_bytes": "download per round",
    "downlink_bytes_per_site": "download per round",
    "seconds": "training time in a round",
    "tokens": "tokens read",
    "answer_tokens": "answer tokens trained on",
    "rows": "training rows",
}
# What a person asks for first, of all that a round may have measured.
FIRST = (
    *("loss", "validation_loss", "received_validation_loss"),
    *(name for name in METRICS if METRICS[name].headline is not None),
    "parse_rate",
    *("aggregation_error", "epsilon"),
)
_WIDTH = 34  # of a score's name in a line


def label(name: str) -> str:
    """Return what a measurement is called: `scores.parse_rate` is "parse rate"."""
    last = name.rsplit(".", 1)[-1]
    if last in METRICS:
        return METRICS[last].label
    if last.startswith("own_"):
        return f"{label(last[4:])} on each site's own kind of rows"
    return _LABELS.get(last, last.replace("_", " "))


def first_numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a round or step that a person asks for first, where it has them."""
    scores = event.get("scores") or {}
    known = {**event, **{n: scores[n] for n in (*headlines(scores), "parse_rate") if n in scores}}
    numbers = {name: known.get(name) for name in FIRST}
    return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def number_words(numbers: Mapping[str, float]) -> list[str]:
    """Return numbers with their names, in the order in which one asks for them."""
    names = [name for name in FIRST if name in numbers]
    if "validation_loss" in names and "received_validation_loss" in names:
        names.remove("received_validation_loss")  # of the round before
    return [f"{label(name)} {number(name, numbers[name])}" for name in names]


def describe(event: Mapping[str, Any], total: int | None = None) -> str | None:
    """Return an event in a line; None for those of which nothing is said.

    Args:
        event: As metrics.jsonl holds it. All but its kind, place and reason may be missing: record
            privacy and secure aggregation hide losses.
        total: How many rounds or steps there will be.
    """
    kind = event["event"]
    of = f"/{total}" if total else ""
    place = next((f"{name} {event[name]}{of}" for name in ("round", "step") if name in event), "")
    match kind:
        case "round" | "step":
            sites = [counted(len(event["sites"]), "site")] if "sites" in event else []
            return "   ".join([f"{place:12s}", *sites, *number_words(first_numbers(event))]).strip()
        case "validation":
            return f"{place}: validation loss {event['loss']:.4f}"
        case "rejected":
            return f"{place}: without {event['site']}: {event['reason']}"
        case "absent":
            return f"{event['site']} takes no part: {event['reason']}"
        case "joined":
            return f"{place}: {event['site']} joins"
        case "resumed":
            return f"resumed after round {event['after_round']}"
        case "lost":
            return f"{place}: lost: {event['reason']}"
        case "waiting":
            return f"{place}: tried again in {event['pause']:g} s: {event['reason']}"
        case "stopped_early":
            return f"no better round since round {event['best_round']}: stopped"
    return None


def number(name: str, value: float) -> str:
    """Return a value as a person reads it, with the unit that its name tells."""
    last = name.rsplit(".", 1)[-1]
    if not math.isfinite(value):
        return str(value)
    if "bytes" in last:
        return data_size(value)
    if last.endswith(("seconds", "_s")):
        return duration(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def data_size(num_bytes: float) -> str:
    """Return a number of bytes in the unit that leaves few digits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            value = num_bytes / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Return seconds as "0.52 s", "48 s", "3 min 14 s" or "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    rounded_s = round(seconds)
    if rounded_s < 60:
        return f"{rounded_s} s"
    if rounded_s < 3600:
        return f"{rounded_s // 60} min {rounded_s % 60} s"
    return f"{rounded_s // 3600} h {rounded_s % 3600 // 60} min"


def tabled_scores(scores: Mapping[str, Any]) -> list[str]:
    """Return the names of the scores that a short table shows, for their kind of task."""
    kind = scores.get("metrics")
    shown = {name: METRICS[name].tabled for name in in_order(scores) if name in METRICS}
    return [name for name, kinds in shown.items() if kinds and (kind is None or kind in kinds)]


def score_lines(scores: dict[str, Any]) -> list[str]:
    """Return one line per score with its 95 % interval, then one per relation."""
    if not scores:
        return ["no references, so no scores"]
    lines = [f"{'rows':{_WIDTH}s} {scores['rows']:7d}"]
    names = [name for name in in_order(scores) if name != "rows" and is_score(scores[name])]
    for name in names:
        line = f"{label(name):{_WIDTH}s} {scores[name]:7.3f}"
        if name in (intervals := scores.get("intervals", {})):
            low, high = intervals[name]
            line += f"  [{low:.3f}, {high:.3f}]"
        lines.append(line)
    for relation, of in scores.get("relations", {}).items():
        line = f"  {'F1 of ' + printable(relation):{_WIDTH - 2}s} {of['f1']:7.3f}"
        if "lenient_f1" in of:
            line += f"  (folded {of['folded_f1']:.3f}, lenient {of['lenient_f1']:.3f})"
        lines.append(line + f"  of {of['expected']} expected")
    return lines


def is_score(value: Any) -> bool:
    """Say whether a value among scores is a score, and no breakdown of one."""
    return isinstance(value, int | float) and not isinstance(value, bool)
