"""Scores to lines of text."""

from typing import Any

_NAMES = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1 (micro)",
    "macro_precision": "precision (macro over rows)",
    "macro_recall": "recall (macro over rows)",
    "macro_f1": "F1 (macro over rows)",
    "parse_rate": "parse rate (form only)",
    "accuracy": "accuracy, as written",
    "likelihood_accuracy": "accuracy, by likelihood",
    "parsed_share": "share that parsed",
    "token_f1": "token F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU (0 to 100)",
    "chrf": "chrF (0 to 100)",
    "exact_match": "exact match",
    "loss": "loss per token",
    "perplexity": "perplexity",
    "original_f1": "F1 by the original's rule",
    "original_character_f1": "character F1 (original's)",
}
_WIDTH = 28


def score_lines(scores: dict[str, Any]) -> list[str]:
    """Return one line per score with its 95 % interval, then one per relation."""
    if not scores:
        return ["no references, so no scores"]
    intervals = scores.get("intervals", {})
    lines = [f"{'rows':{_WIDTH}s} {scores['rows']:7d}"]
    for name, label in _NAMES.items():
        if name in scores:
            line = f"{label:{_WIDTH}s} {scores[name]:7.3f}"
            if name in intervals:
                low, high = intervals[name]
                line += f"  [{low:.3f}, {high:.3f}]"
            lines.append(line)
    for relation, of in scores.get("relations", {}).items():
        line = f"  {'F1 of ' + relation:{_WIDTH - 2}s} {of['f1']:7.3f}"
        lines.append(line + f"  of {of['expected']} expected")
    return lines
