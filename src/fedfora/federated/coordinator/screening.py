"""Screening: which replies of a round may touch the model, and why the others may not.

Checks go from cheap to costly and end at the first that fails: what the reply claims, then
the headers of its arrays, then the numbers, and last the other updates of the round. For these, the
first replies are held until there are `WINDOW` of them (or no more come), so there is a median from
the start, in bounded memory.

What is refused is left out of the round and named; nothing is repaired.
"""

import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict

from fedfora.federated.aggregation.update import AdapterState
from fedfora.federated.wire.messages import (
    ARRAYS,
    METRIC_NAMES,
    METRICS,
    ORIGIN,
    RECORDS,
    VALIDATION_NAMES,
    ExpectedReply,
    Origin,
    Report,
)
from fedfora.federated.wire.transport import unpack_from
from fedfora.registry import printable

WINDOW = 16
MOST = 1e12  # of anything that a site counts; sums of such numbers are numbers

Sender = TypeVar("Sender")


class RejectedError(ValueError):
    """A reply that is not used; the message says why, and may hold a site's own words."""


@dataclass(frozen=True)
class Limits:
    """How much a site may claim and change.

    Args:
        max_tokens: Largest number of answer tokens.
        max_rows: Largest number of rows.
        max_update_norm: Longest update; infinity for no limit.
        max_norm_ratio: Longest update as a multiple of the median; infinity for no limit.
    """

    max_tokens: float
    max_rows: float = math.inf
    max_update_norm: float = math.inf
    max_norm_ratio: float = math.inf


@dataclass(frozen=True)
class Accepted(Generic[Sender]):
    """A reply that passed.

    Args:
        sender: Who sent it.
        update: The factors that came.
        report: What the site reports about its training.
        norm: Length of what it changed, ||update - sent||_2 over all factors.
    """

    sender: Sender
    update: AdapterState
    report: Report
    norm: float


def screen(
    replies: Iterable[tuple[Sender, Message]],
    expected: Callable[[Sender], ExpectedReply],
    limits: Limits,
    on_rejected: Callable[[Sender, str], None],
) -> Iterator[Accepted[Sender]]:
    """Yield what may be used, in order of arrival; name who sent the rest, and why not."""
    held: list[Accepted[Sender]] = []
    norms: list[float] = []
    for sender, reply in replies:
        try:
            held.append(_inspect(sender, reply, expected(sender), limits))
        except Exception as error:  # whatever reading their bytes may raise
            on_rejected(sender, printable(error))
            continue
        insort(norms, held[-1].norm)
        if len(norms) >= WINDOW:
            yield from _like_the_others(held, norms, limits, on_rejected)
            held.clear()
    yield from _like_the_others(held, norms, limits, on_rejected)


def read_validation(reply: Message) -> tuple[float, int]:
    """Return loss and answer tokens from a site's answer to an evaluation.

    Raises:
        RejectedError: If it is something else.
    """
    content = _content(reply, {METRICS})
    _check_metrics(content, VALIDATION_NAMES)
    metrics = content[METRICS]
    return float(metrics["validation_loss"]), int(metrics["validation_tokens"])


def read_masked(reply: Message, origin: Origin) -> ArrayRecord:
    """Return the arrays of an answer under secure aggregation.

    Their content is hidden from the coordinator; only what the reply says about itself is checked.

    Raises:
        RejectedError: If it is something else, or starts from anything but `origin`.
    """
    content = _content(reply, {ARRAYS, ORIGIN})
    _check_origin(content, origin)
    if not isinstance(content[ARRAYS], ArrayRecord):
        raise RejectedError(f"records: {ARRAYS!r} holds no arrays")
    return content[ARRAYS]


def check_arrays(record: ArrayRecord, example: ArrayRecord) -> None:
    """Raise unless names, formats, shapes and sizes are those of the example.

    Looks only at headers and byte counts, so an oversized payload is never decoded.

    Raises:
        RejectedError: Naming the first difference.
    """
    if list(record) != list(example):
        raise RejectedError(f"arrays: expected {list(example)}, got {list(record)[:10]}")
    for name, array in example.items():
        for what in ("dtype", "shape", "stype"):
            expected_value, got = getattr(array, what), getattr(record[name], what)
            if got != expected_value:
                raise RejectedError(f"{what} of {name!r}: expected {expected_value}, got {got}")
        expected_value, got = len(array.data), len(record[name].data)
        if got != expected_value:
            raise RejectedError(f"size of {name!r}: expected {expected_value} bytes, got {got}")


def _inspect(
    sender: Sender, reply: Message, expected: ExpectedReply, limits: Limits
) -> Accepted[Sender]:
    content = _content(reply, RECORDS)
    _check_origin(content, expected.origin)
    _check_metrics(content, METRIC_NAMES)
    report = Report(**content[METRICS])
    for name, most in (("answer_tokens", limits.max_tokens), ("rows", limits.max_rows)):
        if not 0 < (number := getattr(report, name)) <= most:
            raise RejectedError(f"weight: {number} {name} are not in (0, {most:g}] (--max_weight)")
    if not isinstance(content[ARRAYS], ArrayRecord):
        raise RejectedError(f"records: {ARRAYS!r} holds no arrays")
    check_arrays(content[ARRAYS], expected.example)
    try:
        update = unpack_from(content[ARRAYS], expected.sent, expected.layout, expected.form)
    except Exception as error:  # whatever numpy raises on bytes that somebody else wrote
        raise RejectedError(f"the update cannot be read: {error}") from error
    norm = distance(update, expected.sent)
    if not norm <= limits.max_update_norm:
        raise RejectedError(
            f"norm: the update's length {norm:.3g} is above {limits.max_update_norm:.3g} "
            "(--max_update_norm)"
        )
    return Accepted(sender, update, report, norm)


def _content(reply: Message, records: set[str]) -> RecordDict:
    """Return what a reply holds, if it is these records."""
    if reply.has_error():
        raise RejectedError(f"error {reply.error.code}: {reply.error.reason}")
    if set(reply.content) != records:
        got = sorted(reply.content)[:10]
        raise RejectedError(f"records: expected {sorted(records)}, got {got}")
    return reply.content


def _check_origin(content: RecordDict, expected: Origin) -> None:
    got, asked = dict(content[ORIGIN]), vars(expected)
    if got != asked:
        wrong = [f"{n} {got.get(n)!r}, not {asked[n]!r}" for n in asked if got.get(n) != asked[n]]
        raise RejectedError(f"origin: {'; '.join(wrong) or 'more than was asked for'}")


def _check_metrics(content: RecordDict, names: set[str]) -> None:
    record = content[METRICS]
    if set(record) != names:
        raise RejectedError(f"metrics: missing or unknown {sorted(set(record) ^ names)[:5]}")
    for name, value in record.items():
        if type(value) not in (int, float) or not 0 <= value <= MOST:
            raise RejectedError(f"metrics: {name} is {str(value)[:40]}, not in [0, {MOST:g}]")


def _like_the_others(
    candidates: list[Accepted[Sender]],
    norms: list[float],
    limits: Limits,
    on_rejected: Callable[[Sender, str], None],
) -> Iterator[Accepted[Sender]]:
    """Yield the updates that are not too long compared with the others of the round.

    An update's length is judged against the lower median of the lengths so far, so one site among
    three or more cannot move the limit at will. The median is bounded by the honest sites' values
    as long as these are more than half.
    """
    for candidate in candidates:
        median = norms[(len(norms) - 1) // 2]
        if 0 < median * limits.max_norm_ratio < candidate.norm:
            on_rejected(
                candidate.sender,
                f"norm: the update's length {candidate.norm:.3g} is more than "
                f"{limits.max_norm_ratio:g} times the median {median:.3g} (--max_norm_ratio)",
            )
        else:
            yield candidate


def distance(update: AdapterState, sent: AdapterState) -> float:
    """Return ||update - sent||_2 over all factors, in float64.

    A factor whose shape differs from the one sent (a site with a rank of its own) counts in full.
    """
    total = 0.0
    for name, value in update.items():
        start = sent.get(name)
        moved = value.double()
        if start is not None and start.shape == value.shape:
            moved = moved - start.double()
        total += float(moved.square().sum())
    return math.sqrt(total)
