"""What a metric is: from an answered row to numbers that add up, and from their sums to a score.

Every score, also one of a whole corpus such as BLEU, is a function of sums over rows. So a row, a
corpus and a bootstrap sample are scored by the same code. Metrics know nothing of models.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fedfora.registry import Registry

KINDS = ("triples", "text", "choice")


@dataclass(frozen=True)
class Answer:
    """One answered row.

    Args:
        prediction: What the model wrote.
        reference: What is right.
        prompt: What the model read.
        options: The answers to choose from, if the row is a choice.
        likeliest: Index of the option that the model finds likeliest; None if nobody asked.
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
        total: The sums to the score; NaN if no row could be scored.
        label: Its name for people.
        tabled: The kinds of task whose short tables show it.
        row: The name of the score of a single row; None if a single row has no such score.
        package: The module that it needs beyond fedfora's own, if any.
        headline: Its rank among the scores that sum up an evaluation: those of the lowest rank that
            is there do, and the first of them judges. None for none.
    """

    kinds: tuple[str, ...]
    counts: Counts
    total: Total
    label: str
    tabled: tuple[str, ...]
    row: str | None = None
    package: str | None = None
    headline: int | None = None


METRICS: Registry[Metric] = Registry("metric")


def mean(sums: Sequence[float]) -> float:
    """Return the mean of a value over rows, from the sums of `(value, 1)`; NaN without rows."""
    value, rows = sums
    return value / rows if rows else math.nan


def metric(
    name: str,
    *kinds: str,
    total: Total = mean,
    label: str | None = None,
    tabled: bool | str = False,
    **facts: Any,
) -> Callable[[C], C]:
    """Return a decorator that registers a function of a row as a metric and leaves it as it is.

    Args:
        name: Of the score.
        *kinds: As in `Metric`, like all that follows.
        total: Sums to score. A mean is that of the rows' scores of the same name.
        label: Default: the name with spaces.
        tabled: Whether short tables show it; a kind of task for those of that kind alone.
        **facts: `row`, `package` and `headline`.
    """
    shown = (tabled,) if isinstance(tabled, str) else kinds if tabled else ()

    def register(counts: C) -> C:
        row = {"row": name} if total is mean else {}
        called = label or name.replace("_", " ")
        METRICS.add(name, Metric(kinds, counts, total, called, shown, **(row | facts)))
        return counts

    return register


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of scores in the order for people: as registered, those of many kinds last.

    Names that belong to no metric follow, as they come.
    """
    order, given = sorted(METRICS, key=lambda name: len(METRICS[name].kinds)), list(names)
    return [n for n in order if n in given] + [n for n in given if n not in METRICS]


def headlines(names: Iterable[str]) -> list[str]:
    """Return the names of the scores that sum up an evaluation, the one that judges first.

    These are F1 for triples, accuracy for choices, ROUGE-L and chrF for text; none without scores.
    """
    ranks = {n: METRICS[n].headline for n in in_order(names) if n in METRICS}
    ranked = {name: rank for name, rank in ranks.items() if rank is not None}
    return [name for name, rank in ranked.items() if rank == min(ranked.values())]
