"""Scores to lines of text."""

from typing import Any

from fedfora.reporting.wording import label

# In this order where a file has them; any other score follows as it came.
_FIRST = (
    *("precision", "recall", "f1", "macro_precision", "macro_recall", "macro_f1", "parse_rate"),
    *("accuracy", "likelihood_accuracy", "parsed_share"),
    *("token_f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match"),
    *("loss", "perplexity", "original_f1", "original_character_f1"),
)
_WIDTH = 34


def score_lines(scores: dict[str, Any]) -> list[str]:
    """Return one line per score with its 95 % interval, then one per relation."""
    if not scores:
        return ["no references, so no scores"]
    lines = [f"{'rows':{_WIDTH}s} {scores['rows']:7d}"]
    others = [name for name in scores if name not in (*_FIRST, "rows")]
    lines += [_line(name, scores) for name in (*_FIRST, *others) if _is_score(scores.get(name))]
    for relation, of in scores.get("relations", {}).items():
        line = f"  {'F1 of ' + relation:{_WIDTH - 2}s} {of['f1']:7.3f}"
        lines.append(line + f"  of {of['expected']} expected")
    return lines


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(name: str, scores: dict[str, Any]) -> str:
    line = f"{label(name):{_WIDTH}s} {scores[name]:7.3f}"
    if name in (intervals := scores.get("intervals", {})):
        low, high = intervals[name]
        line += f"  [{low:.3f}, {high:.3f}]"
    return line
