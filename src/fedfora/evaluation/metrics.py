"""What a metric is: an answered row to numbers that add up, and their sums to one score.

Every score, also one of a whole corpus such as BLEU, is a function of sums over rows. So a row, a
corpus and a bootstrap sample are scored by the same code. Metrics know nothing of models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedfora.registry import Registry

KINDS = ("triples", "text", "choice")


@dataclass(frozen=True)
class Answer:
    """One answered row.

    Args:
        prediction: What the model wrote.
        reference: What is right.
        prompt: What the model read.
        options: The answers to choose from, where the row is a choice.
        likeliest: Index of the option that the model finds likeliest; None where nobody asked.
    """

    prediction: str
    reference: str
    prompt: str = ""
    options: tuple[str, ...] = ()
    likeliest: int | None = None


Counts = Callable[[Answer], Sequence[float]]
Total = Callable[[Sequence[float]], float]
C = TypeVar("C", bound=Counts)


@dataclass(frozen=True)
class Metric:
    """A score.

    Args:
        kinds: The kinds of task it belongs to, of `KINDS`.
        counts: A row to numbers; always as many, added up over rows.
        total: The sums to the score; NaN where no row could be scored.
        row: The name of the score of a single row; None where a single row has no such score.
        package: The module that it needs beyond fedfora's own, if any.
    """

    kinds: tuple[str, ...]
    counts: Counts
    total: Total
    row: str | None
    package: str | None


METRICS: Registry[Metric] = Registry("metric")


def metric(
    name: str, *kinds: str, total: Total, row: str | None = None, package: str | None = None
) -> Callable[[C], C]:
    """Return a decorator that registers a function of a row as a metric and leaves it as it is."""

    def register(counts: C) -> C:
        METRICS.add(name, Metric(kinds, counts, total, row, package))
        return counts

    return register


def mean(sums: Sequence[float]) -> float:
    """Return the mean of a value over rows, from the sums of `(value, 1)`; NaN without rows."""
    value, rows = sums
    return value / rows if rows else math.nan
