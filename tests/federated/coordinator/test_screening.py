"""Lengths against the median, in bounded memory; what the fault tests cannot show."""

import itertools
import math

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from fedfora.federated.coordinator.exchange import _limits
from fedfora.federated.coordinator.screening import (
    WINDOW,
    Limits,
    RejectedError,
    check_arrays,
    distance,
    read_masked,
    read_validation,
    screen,
)
from fedfora.federated.embedded import EmbeddedGrid
from fedfora.federated.settings import from_run_config
from fedfora.federated.wire.messages import ARRAYS, METRICS, ORIGIN, ExpectedReply, Origin, Report
from fedfora.federated.wire.transport import Layout, pack

SENT = {"q.A": torch.zeros(2, 3), "q.D": torch.zeros(3, 2), "q.E": torch.zeros(2, 2)}
LAYOUT = Layout.of(SENT)
ORIGINS = Origin(1, "base", LAYOUT.digest)
EXPECTED = ExpectedReply(ORIGINS, LAYOUT, pack(SENT, LAYOUT), SENT)


@pytest.fixture(autouse=True)
def _in_a_process_that_flower_knows():
    EmbeddedGrid(None, [], {})


def reply(length, tokens=10):
    """An honest reply whose update has this length."""
    update = {name: value.clone() for name, value in SENT.items()}
    update["q.A"][0, 0] = length
    report = Report(loss=1.0, answer_tokens=tokens, tokens=20, rows=5, steps=1, seconds=0.1)
    content = RecordDict(
        {
            ARRAYS: pack(update, LAYOUT),
            METRICS: MetricRecord(vars(report)),
            ORIGIN: ConfigRecord(vars(ORIGINS)),
        }
    )
    return Message(content, 1, "train")


def screened(replies, **limits):
    refused = {}
    accepted = [
        item.sender
        for item in screen(
            replies,
            lambda sender: EXPECTED,
            Limits(**{"max_tokens": 100, **limits}),
            lambda sender, reason: refused.__setitem__(sender, reason),
        )
    ]
    return accepted, refused


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_update_far_from_the_median_is_refused_wherever_it_comes(place):
    lengths = [1.0, 1.5, 2.0, 1.2, 0.8, 1.1]
    lengths.insert(place, 50.0)
    accepted, refused = screened(
        ((i, reply(n)) for i, n in enumerate(lengths)), max_norm_ratio=10.0
    )
    assert list(refused) == [place]
    assert accepted == [i for i in range(7) if i != place]  # in the order in which they came


def test_fewer_than_half_cannot_move_the_limit():
    lengths = [1e6, 1.0, 1e6, 1.0, 1.0]
    _, refused = screened(((i, reply(n)) for i, n in enumerate(lengths)), max_norm_ratio=10.0)
    assert sorted(refused) == [0, 2]


def test_of_two_that_differ_the_shorter_is_believed():
    _, refused = screened([(0, reply(100.0)), (1, reply(1.0))], max_norm_ratio=10.0)
    assert list(refused) == [0]


def test_updates_of_length_zero_say_nothing_about_others():
    lengths = [0.0, 0.0, 1.0]
    accepted, _ = screened(((i, reply(n)) for i, n in enumerate(lengths)), max_norm_ratio=10.0)
    assert accepted == [0, 1, 2]


def test_no_more_than_the_window_is_held_back():
    """The law of flat memory: after so many replies, each is passed on before the next is read."""
    read = itertools.count(1)
    taken = 0

    def stream():
        nonlocal taken
        for sender in range(200):
            taken = next(read)
            yield sender, reply(1.0 + sender % 3)

    limits = Limits(max_tokens=100, max_norm_ratio=10.0)
    lags = [
        taken - given
        for given, _ in enumerate(screen(stream(), lambda s: EXPECTED, limits, print), start=1)
    ]
    assert max(lags) == WINDOW - 1
    assert set(lags[WINDOW:]) == {0}


def test_limits_are_inclusive():
    assert screened([(0, reply(5.0))], max_update_norm=5.0)[0] == [0]
    assert screened([(0, reply(5.1))], max_update_norm=5.0)[0] == []
    assert screened([(0, reply(1.0, tokens=100))])[0] == [0]
    assert screened([(0, reply(1.0, tokens=101))])[0] == []


BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (BATCH, (2 * 8 * 512, math.inf)),
        ({**BATCH, "max_weight": 9.0}, (9, math.inf)),
        ({**BATCH, "weighting": "rows"}, (2 * 8 * 512, 40)),
        ({**BATCH, "weighting": "rows", "max_weight": 9.0}, (2 * 8 * 512, 9)),
        ({**BATCH, "weighting": "rows", "max_weight": 1e6}, (1e6, 1e6)),
        ({"privacy_unit": "record", "target_epsilon": 8.0}, (2 * 40, math.inf)),
    ],
)
def test_no_weight_is_above_what_steps_and_rows_can_have_earned(flags, expected):
    """With record privacy it had no bound, and with --weighting rows neither."""
    settings = from_run_config({"local_steps": 2, "max_target_length": 512, **flags})
    limits = _limits(settings, most_rows=40)
    assert (limits.max_tokens, limits.max_rows) == expected


def test_a_yes_is_no_number():
    yes = reply(1.0)
    yes.content[METRICS] = ConfigRecord({**vars(Report(1.0, 10, 20, 0.1, 1, 5)), "rows": True})
    assert screened([(0, yes)])[1] == {0: "metrics: rows is True, not in [0, 1e+12]"}


def test_an_error_is_named_with_its_reason():
    asked = Message(RecordDict(), 1, "train")
    _, refused = screened([(7, Message(Error(2, "out of memory"), reply_to=asked))])
    assert refused == {7: "error 2: out of memory"}


@pytest.mark.parametrize("record", [ARRAYS, METRICS, ORIGIN])
def test_whatever_a_record_is_it_is_refused_in_one_short_line(record):
    """Of another kind, or with words of its own that a terminal obeys."""
    words = "\x1b[2J\n2026-11-28 03:00:00 forged" * 50
    others = [
        ConfigRecord({words: words}),
        MetricRecord({words: 1}),
        ArrayRecord({words: Array("\x1b[2J", (1,), words, b"")}),
        ArrayRecord({"numbers": Array("\x1b[2J", (16,), words, b"")}),
    ]
    replies = [reply(1.0) for _ in others]
    for each, other in zip(replies, others, strict=True):
        each.content[record] = other
    accepted, refused = screened([*enumerate(replies), (9, reply(1.0))])
    assert accepted == [9]
    assert sorted(refused) == [0, 1, 2, 3]
    for reason in refused.values():
        assert reason.isprintable()
        assert len(reason) <= 200


@pytest.mark.parametrize("field", ["round_number", "base_fingerprint", "layout_digest", "more"])
def test_masked_words_of_another_round_base_or_adapter_are_not_added(field):
    masked = reply(1.0)
    del masked.content[METRICS]
    assert list(read_masked(masked, ORIGINS)) == list(EXPECTED.example)
    masked.content[ORIGIN] = ConfigRecord({**vars(ORIGINS), field: "other"})
    with pytest.raises(RejectedError, match="origin: "):
        read_masked(masked, ORIGINS)
    with pytest.raises(RejectedError, match="records: "):
        read_masked(reply(1.0), ORIGINS)


@pytest.mark.parametrize("name", ["validation_loss", "validation_tokens", "more"])
def test_a_validation_is_two_numbers_and_nothing_else(name):
    told = reply(1.0)
    for record in (ARRAYS, ORIGIN):
        del told.content[record]
    told.content[METRICS] = MetricRecord({"validation_loss": 1.5, "validation_tokens": 7})
    assert read_validation(told) == (1.5, 7)
    told.content[METRICS] = MetricRecord({**told.content[METRICS], name: -1})
    with pytest.raises(RejectedError, match="metrics: "):
        read_validation(told)


def test_distance_by_hand():
    moved = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0, 1.0])}
    start = {"a": torch.tensor([0.0]), "b": torch.tensor([0.0, 1.0])}
    assert distance(moved, start) == 5.0
    assert distance({"a": torch.ones(2, 2)}, start) == 2.0  # another rank counts whole


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(15, np.float32), "shape"),
        (np.zeros((16, 1), np.float32), "shape"),
        (np.zeros(16, np.float16), "dtype"),
    ],
)
def test_headers_are_compared_without_reading_the_payload(array, message):
    (name,) = EXPECTED.example
    with pytest.raises(RejectedError, match=message):
        check_arrays(ArrayRecord({name: Array(array)}), EXPECTED.example)
