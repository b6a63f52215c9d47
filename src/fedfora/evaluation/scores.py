"""Answered rows to the scores that their kind of task asks for, with confidence intervals."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfora.data.loading import Example, options_of, text_in
from fedfora.data.sources import json_rows, text_of
from fedfora.evaluation.settings import EvaluateArguments
from fedfora.metrics import KINDS, METRICS, Answer, Metric
from fedfora.metrics.choice import are_letters, letters_of
from fedfora.metrics.triples import are_triples, relation_scores
from fedfora.seeds import derive_seed

logger = logging.getLogger(__name__)

ORIGINAL = "original_"  # what these metrics' names begin with
INSTALL = 'pip install "fedfora[evaluation]"'


@dataclass(frozen=True)
class Scores:
    """The scores of some rows.

    Args:
        summary: `rows`, `metrics` (the kind), one number per metric, `intervals` with the bounds of
            each, and for triples `relations`.
        rows: The scores of each row on its own.
    """

    summary: dict[str, Any]
    rows: list[dict[str, float]]


def kind_of(references: Sequence[str], *, with_options: bool = False) -> str:
    """Return the kind of task that the references look like: "triples", "choice" or "text"."""
    if are_triples(references):
        return "triples"
    return "choice" if with_options or are_letters(references) else "text"


def check_packages(kind: str) -> None:
    """Raise if a metric of a kind needs a package that is missing, with what installs it."""
    missing = sorted({m.package for m in _metrics(kind).values() if m.package and not _has(m)})
    if missing:
        raise ValueError(f"--metrics {kind} needs {' and '.join(missing)}: {INSTALL}")


def score(
    answers: Sequence[Answer], kind: str, *, seed: int = 42, original: bool = False
) -> Scores:
    """Score rows by every metric of a kind.

    A metric whose package is not installed is left out with a warning; `check_packages` refuses.

    Args:
        answers: The rows; at least one.
        kind: One of `fedfora.metrics.KINDS`.
        seed: Seed of the intervals' resampling.
        original: Whether to score as the original program did, too.

    Raises:
        ValueError: If there are no rows, or no such kind.
    """
    if not answers:
        raise ValueError("no rows to score")
    known = _metrics(kind)
    asked = [name for name in known if original or not name.startswith(ORIGINAL)]
    metrics = {name: known[name] for name in asked if _has(known[name])}
    if missing := [name for name in asked if name not in metrics]:
        logger.warning("not scored: %s (%s)", ", ".join(missing), INSTALL)
    answers = with_options(answers) if kind == "choice" else answers
    counts = {name: [metric.counts(row) for row in answers] for name, metric in metrics.items()}
    summary: dict[str, Any] = {"rows": len(answers), "metrics": kind}
    summary |= _totals(metrics, counts, derive_seed(seed, "bootstrap"))
    if kind == "triples":
        summary["relations"] = relation_scores(answers)
    return Scores(summary, _rows(metrics, counts, len(answers)))


def _metrics(kind: str) -> dict[str, Metric]:
    if kind not in KINDS:
        raise ValueError(f"unknown metrics {kind!r} (known: {', '.join(KINDS)})")
    return {name: METRICS[name] for name in sorted(METRICS) if kind in METRICS[name].kinds}


def _has(metric: Metric) -> bool:
    return metric.package is None or find_spec(metric.package) is not None


def with_options(answers: Sequence[Answer]) -> list[Answer]:
    """Give rows without options those of the whole file: its different references."""
    options = letters_of([answer.reference for answer in answers])
    return [answer if answer.options else replace(answer, options=options) for answer in answers]


def _totals(
    metrics: dict[str, Metric], counts: dict[str, list[Sequence[float]]], seed: int
) -> dict[str, Any]:
    parts = [np.array(rows, dtype=np.float64) for rows in counts.values()]
    sums_BK = resampled_sums(np.hstack(parts), seed=seed)
    ends = np.cumsum([part.shape[1] for part in parts])
    scores: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for name, part, samples in zip(metrics, parts, np.split(sums_BK, ends[:-1], 1), strict=True):
        value = metrics[name].total(part.sum(axis=0).tolist())
        if not math.isnan(value):
            scores[name] = value
            intervals[name] = list(interval(samples, metrics[name].total))
    return {**scores, "intervals": intervals}


def _rows(
    metrics: dict[str, Metric], counts: dict[str, list[Sequence[float]]], num_rows: int
) -> list[dict[str, float]]:
    named = [(metric.row, metric.total, counts[n]) for n, metric in metrics.items() if metric.row]
    rows = []
    for index in range(num_rows):
        values = {str(name): total(row_counts[index]) for name, total, row_counts in named}
        rows.append({name: value for name, value in values.items() if not math.isnan(value)})
    return rows


# Numbers of rows to confidence intervals of what their sums give, by resampling the rows.

RESAMPLES = 1000
LEVEL = 0.95  # share of the samples' scores inside the interval
_CHUNK = 2**22  # drawn row numbers held at a time


def resampled_sums(
    counts_NK: NDArray[np.float64], *, seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Return the column sums, `(resamples, K)`, of samples of N rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    num_rows = len(counts_NK)
    step = max(1, _CHUNK // num_rows)
    parts = []
    for start in range(0, resamples, step):
        rows = rng.integers(num_rows, size=(min(step, resamples - start), num_rows))
        times = np.stack([np.bincount(sample, minlength=num_rows) for sample in rows])
        parts.append(times @ counts_NK)
    return np.concatenate(parts)


def interval(
    sums_BK: NDArray[np.float64], total: Callable[[Sequence[float]], float]
) -> tuple[float, float]:
    """Return the percentile interval of a score (Efron and Tibshirani 1993, Sec. 13.3).

    `total` maps the sums of a sample, as `resampled_sums` returns them, to its score.
    """
    scores = [total(sums) for sums in sums_BK.tolist()]
    low, high = np.nanpercentile(scores, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


# A file of predictions to scores: fedfora's own, or any JSON with two columns of text.


def score_file(arguments: EvaluateArguments) -> dict[str, Any]:
    """Return the scores of a file of rows with predictions and references.

    Raises:
        ValueError: If the file is missing or broken, a row has no reference, or a package is
            missing.
    """
    path, kind = arguments.predictions_file, str(arguments.metrics)
    if kind != "auto":
        check_packages(kind)
    if not Path(path).is_file():
        raise ValueError(f"--predictions_file: no such file: {path}")
    answers = [_answer_in(row, where, arguments) for where, row in json_rows(path, text_of(path))]
    if not answers:
        raise ValueError(f"{path}: no rows")
    if kind == "auto":
        chosen = all(answer.options for answer in answers)
        kind = kind_of([answer.reference for answer in answers], with_options=chosen)
    return score(answers, kind, seed=arguments.seed, original=arguments.original_scores).summary


def _answer_in(row: Any, where: str, arguments: EvaluateArguments) -> Answer:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
    for flag in ("prediction_column", "reference_column"):
        if row.get(column := getattr(arguments, flag)) is None:
            has = ", ".join(row)
            raise ValueError(f'{where}: no "{column}" to score; the row has: {has} (--{flag})')
    columns = (arguments.prediction_column, arguments.reference_column, "instruction", "input")
    prediction, reference, instruction, given = (text_in(row, c, where) or "" for c in columns)
    return Answer(
        prediction,
        reference,
        prompt=Example(instruction, given, None, {}).prompt,
        options=options_of(row.get("options") or None, where, "options"),
        likeliest=row.get("likeliest"),
    )
