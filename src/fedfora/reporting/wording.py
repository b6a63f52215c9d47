"""Names and numbers of the record to what a person reads."""

import math

_LABELS = {
    "loss": "training loss",
    "scores": "scores on held-out rows",
    "validation_loss": "loss on held-back rows",
    "received_validation_loss": "loss of the received adapter on held-back rows",
    "f1": "F1",
    "macro_precision": "precision, mean over rows",
    "macro_recall": "recall, mean over rows",
    "macro_f1": "F1, mean over rows",
    "token_f1": "token F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU (0 to 100)",
    "chrf": "chrF (0 to 100)",
    "accuracy": "accuracy, as written",
    "likelihood_accuracy": "accuracy, by likelihood",
    "parsed_share": "share that parsed",
    "original_f1": "F1 as the original code counts it",
    "original_character_f1": "character F1 of the original",
    "parse_rate": "parse rate",
    "norm": "length of the update",
    "cosine": "cosine of the update to the round's median",
    "attainable_error": "aggregation error of the exact mean",
    "exact_match": "exact match",
    "aggregation_error": "aggregation error",
    "aggregation_error_of_step": "aggregation error of the round's change",
    "largest_error": "largest rounding error of the masked mean",
    "weight": "weight of all sites",
    "uplink_bytes": "sent by a site in a round",
    "downlink_bytes": "received by a site in a round",
    "downlink_bytes_per_site": "received by a site in a round",
    "seconds": "training time in a round",
    "tokens": "tokens read",
    "answer_tokens": "answer tokens trained on",
    "rows": "training rows",
}
_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


def label(name: str) -> str:
    """Return what a measurement is called: `scores.parse_rate` is "parse rate"."""
    last = name.rsplit(".", 1)[-1]
    return _LABELS.get(last, last.replace("_", " "))


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
    for unit, size in (("GiB", _GIB), ("MiB", _MIB), ("KiB", _KIB)):
        if num_bytes >= size:
            value = num_bytes / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Return seconds as "0.52 s", "48 s", "3 min 14 s" or "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
