"""Scores to lines of text."""

from typing import Any

_NAMES = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1 (micro)",
    "macro_f1": "F1 (macro over rows)",
    "parse_rate": "parse rate",
    "exact_match": "exact match",
}


def score_lines(scores: dict[str, Any]) -> list[str]:
    """Return one line per score, then one per relation."""
    if not scores:
        return ["no references, so no scores"]
    lines = [f"{'rows':24s} {scores['rows']:7d}"]
    lines += [
        f"{label:24s} {scores[name]:7.3f}" for name, label in _NAMES.items() if name in scores
    ]
    for relation, f1 in scores.get("relation_f1", {}).items():
        lines.append(f"  {'F1 of ' + relation:22s} {f1:7.3f}")
    return lines
