"""Whatever one site does, the others' round is theirs: as if the site had said it cannot go on.

The law behind every case: the adapter of a run in which a site misbehaves is, to the bit, that of a
run in which the same site fails in the same rounds, and the record names the site and the reason.
"""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedfora.federated.coordinator import rounds
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.models.saving import read_adapter
from fedfora.reporting.view import View

VICTIM = "neurology"  # site 2


def _replaced(content, **records):
    return RecordDict({**dict(content), **records})


def numbers_changed(change):
    """A fault in the numbers of every array that travels, headers told truly."""

    def fault(content):
        arrays = {name: Array(change(a.numpy().copy())) for name, a in content["arrays"].items()}
        return _replaced(content, arrays=ArrayRecord(arrays))

    return fault


def metric(name, value):
    return lambda content: _replaced(
        content, metrics=MetricRecord({**dict(content["metrics"]), name: value})
    )


def origin(name, value):
    return lambda content: _replaced(
        content, origin=ConfigRecord({**dict(content["origin"]), name: value})
    )


def first_set_to(value):
    def change(numbers):
        numbers.flat[0] = value
        return numbers

    return numbers_changed(change)


def extra_array(content):
    arrays = ArrayRecord({**dict(content["arrays"]), "more": Array(np.zeros(3, np.float32))})
    return _replaced(content, arrays=arrays)


def renamed_array(content):
    arrays = {f"my-{name}": array for name, array in content["arrays"].items()}
    return _replaced(content, arrays=ArrayRecord(arrays))


def lying_header(content):
    """The header says what is expected; the payload holds as many bytes of something else."""
    arrays = {
        name: Array(a.dtype, a.shape, a.stype, Array(a.numpy().view(np.int32)).data)
        for name, a in content["arrays"].items()
    }
    return _replaced(content, arrays=ArrayRecord(arrays))


def garbage_payload(content):
    arrays = {
        name: Array(a.dtype, a.shape, a.stype, b"\x00" * len(a.data))
        for name, a in content["arrays"].items()
    }
    return _replaced(content, arrays=ArrayRecord(arrays))


def oversized(content):
    """The right header on far too many bytes."""
    arrays = {
        name: Array(a.dtype, a.shape, a.stype, a.data + b"\x00" * 5_000_000)
        for name, a in content["arrays"].items()
    }
    return _replaced(content, arrays=ArrayRecord(arrays))


def without(record):
    return lambda content: RecordDict({k: v for k, v in content.items() if k != record})


FAULTS = {
    "nan": (first_set_to(np.nan), "not finite"),
    "infinite": (first_set_to(np.inf), "not finite"),
    "scaled": (numbers_changed(lambda x: 1000 * x), "--max_norm_ratio"),
    "huge": (numbers_changed(lambda x: np.full_like(x, 3e38)), "--max_norm_ratio"),
    "wrong shape": (numbers_changed(lambda x: x[:-1]), "shape"),
    "transposed": (numbers_changed(lambda x: x[:, None]), "shape"),
    "broadcastable shape": (numbers_changed(lambda x: x[:1]), "shape"),
    "wrong dtype": (numbers_changed(lambda x: x.astype(np.float64)), "dtype"),
    "extra array": (extra_array, "arrays: expected"),
    "renamed array": (renamed_array, "arrays: expected"),
    "no arrays": (lambda c: _replaced(c, arrays=ArrayRecord()), "arrays: expected"),
    "lying header": (lying_header, "expected"),
    "garbage": (garbage_payload, "cannot be read"),
    "oversized": (oversized, "size of"),
    "reordered names": (origin("layout_digest", "0123456789abcdef"), "layout_digest"),
    "another base": (origin("base_fingerprint", "feedfeedfeedfeed"), "base_fingerprint"),
    "another round": (origin("round_number", 1), "round_number 1, not 2"),
    "more in the origin": (origin("more", 1), "more than was asked"),
    "weight 1e9": (metric("answer_tokens", 10**9), "weight"),
    "weight zero": (metric("answer_tokens", 0), "weight"),
    "weight negative": (metric("answer_tokens", -5), "not in [0, 1e+12]"),
    "weight not a number": (metric("answer_tokens", float("nan")), "not in [0, 1e+12]"),
    "weight a list": (metric("answer_tokens", [1, 2]), "not in [0, 1e+12]"),
    "rows zero": (metric("rows", 0), "weight: 0 rows"),
    "seconds beyond all clocks": (metric("seconds", 1e308), "not in [0, 1e+12]"),
    "loss that no sum holds": (metric("loss", 1e308), "not in [0, 1e+12]"),
    "loss infinite": (metric("loss", float("inf")), "not in [0, 1e+12]"),
    "extra metric": (metric("secret", 1.0), "metrics: missing or unknown ['secret']"),
    "no metrics": (without("metrics"), "records"),
    "no origin": (without("origin"), "records"),
    "extra record": (lambda c: _replaced(c, more=MetricRecord({"a": 1})), "records"),
    "arrays as metrics": (lambda c: _replaced(c, arrays=MetricRecord({"a": 1})), "holds no arrays"),
    "metrics as arrays": (lambda c: _replaced(c, metrics=ArrayRecord()), "metrics"),
}


@pytest.fixture(scope="module")
def reference():
    """The adapter where the site fails from round 2 on; made by the first test that needs it."""
    return {}


@pytest.fixture
def run(settings, misbehave, tmp_path, reference):
    """Run with a behavior from round 2 on; return rounds, and the adapter after checking the law.

    The run keeps its ordinary deadline unless flags say otherwise.
    """

    def adapter_of(behavior, **flags):
        misbehave(behavior, from_round=2)
        simulate(settings(overwrite_output_dir=True, **flags), View(1))
        return read_adapter(tmp_path / "out")

    def fail(honest, message, context):
        raise RuntimeError("no")

    def checked(behavior, monkeypatch, **flags):
        if "adapter" not in reference:
            reference["adapter"] = adapter_of(fail)
            monkeypatch.undo()  # the next run's site fails in its own way
        adapter = adapter_of(behavior, **flags)
        wanted = reference["adapter"]
        assert all(torch.isfinite(value).all() for value in adapter.values())
        assert [name for name in wanted if not torch.equal(wanted[name], adapter[name])] == []
        return read_rounds(tmp_path / "out")

    return checked


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_reply_is_left_out_and_the_site_named(run, monkeypatch, name):
    fault, reason = FAULTS[name]

    def behave(honest, message, context):
        return Message(fault(honest(message, context).content), reply_to=message)

    first, second = run(behave, monkeypatch)
    assert first["rejected"] == []
    (refused,) = second["rejected"]
    assert refused["site"] == VICTIM
    assert reason in refused["reason"]
    assert VICTIM not in [site["site"] for site in second["sites"]]


@pytest.mark.parametrize("rows", [0, 11, 10**12, 1e308])
def test_a_site_weighs_no_more_rows_than_any_site_has_and_some(settings, misbehave, rows):
    """With more its update was the mean, with 1e308 the mean was no number and the run ended."""

    def behave(honest, message, context):
        return Message(metric("rows", rows)(honest(message, context).content), reply_to=message)

    misbehave(behave, from_round=2)
    _, second = simulate(settings(weighting="rows"), View(1))
    ((site, reason),) = [line.values() for line in second["rejected"]]
    assert site == VICTIM
    assert reason.startswith(("weight: ", "metrics: rows is 1e+308"))


@dataclass
class Replay:
    """Sends the first reply again, in a new envelope."""

    kept: list = field(default_factory=list)

    def __call__(self, honest, message, context):
        reply = honest(message, context)
        self.kept.append(reply.content)
        return Message(self.kept[0], reply_to=message)


def test_a_replayed_reply_is_left_out(settings, misbehave, tmp_path):
    misbehave(Replay())
    first, second = simulate(settings(), View(1))
    assert first["rejected"] == []
    assert "round_number 1, not 2" in second["rejected"][0]["reason"]


def test_a_site_that_never_answers_is_left_out_after_the_deadline(run, monkeypatch):
    def hang(honest, message, context):
        honest(message, context)
        time.sleep(3600)

    started = time.monotonic()
    _, second = run(hang, monkeypatch, round_deadline=10)
    assert time.monotonic() - started < 600
    assert second["rejected"] == [{"site": VICTIM, "reason": "error 4: no answer within 10 s"}]


def test_a_site_that_stops_in_the_middle_of_a_step_leaves_no_trace(run, monkeypatch):
    """Interrupted in a forward pass, the shared model is the next site's all the same."""
    from fedfora.federated.site_runtime import load_runtime

    def hang(honest, message, context):
        model = load_runtime(context.run_config).model
        handle = model.get_input_embeddings().register_forward_hook(lambda *_: time.sleep(3600))
        try:
            return honest(message, context)
        finally:
            handle.remove()

    _, second = run(hang, monkeypatch, round_deadline=10)
    assert "no answer within 10 s" in second["rejected"][0]["reason"]


def test_below_the_quorum_the_run_stops_and_names_who_is_missing(settings, misbehave):
    def fail(honest, message, context):
        raise RuntimeError("out of memory")

    misbehave(fail, from_round=2)
    with pytest.raises(
        ValueError, match=r"round 2: only 3 of 4 sites .* 4 needed .*neurology: error 2"
    ):
        simulate(settings(min_clients=4), View(1))


@pytest.mark.parametrize("flags", [{}, {"aggregation": "fedavg", "server_optimizer": "adam"}])
def test_a_round_without_quorum_is_tried_again_and_comes_to_what_it_would_have(
    settings, misbehave, monkeypatch, flags
):
    """Two sites were away for one night, and a federation of weeks had ended."""
    flags = {**flags, "min_clients": 4}
    whole = simulate(settings(**flags), View(1))
    adapter = read_adapter(settings().run.output_dir)
    away, pauses = [True, True], []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append)
    monkeypatch.setattr(rounds, "time", clock)  # and nobody else's

    def fail(honest, message, context):
        if away:
            away.pop()
            raise RuntimeError("nobody is here at night")
        return honest(message, context)

    misbehave(fail, from_round=2)
    flags |= {"quorum_wait": 60.0, "overwrite_output_dir": True}
    events = simulate(settings(**flags), View(1))
    assert [e["round"] for e in events] == [e["round"] for e in whole] == [1, 2]
    assert pauses == [rounds.FIRST_WAIT_S, 2 * rounds.FIRST_WAIT_S]
    again = read_adapter(settings().run.output_dir)
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)


def test_who_waits_for_a_quorum_waits_as_long_as_was_said(settings, misbehave, monkeypatch):
    def fail(honest, message, context):
        raise RuntimeError("gone for good")

    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    misbehave(fail, from_round=2)
    with pytest.raises(ValueError, match="round 2: only 3 of 4 sites"):
        simulate(settings(min_clients=4, quorum_wait=3600.0), View(1))
    assert 3600 <= now[0] <= 3600 + rounds.LONGEST_WAIT_S


def test_an_absolute_limit_holds_for_a_lone_site_too(settings, misbehave):
    """With one site the median is its own length; --max_update_norm judges it by itself."""

    def scale(honest, message, context):
        content = numbers_changed(lambda x: 1000 * x)(honest(message, context).content)
        return Message(content, reply_to=message)

    misbehave(scale, site=0)
    flags = {"partition": "iid", "num_clients": 1, "num_rounds": 1, "overwrite_output_dir": True}
    assert len(simulate(settings(**flags), View(1))) == 1
    with pytest.raises(ValueError, match=r"site-0: norm: .*--max_update_norm"):
        simulate(settings(**flags, max_update_norm=10.0), View(1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"min_clients": 5}, "--min_clients 5: a round has only 4 sites"),
        ({"min_clients": 0}, "--min_clients must be at least 1"),
        ({"round_deadline": 0.0}, "--round_deadline must be above 0"),
        ({"validation_fraction": 1.0}, "--validation_fraction must be in"),
        ({"max_norm_ratio": 0.5}, "--max_norm_ratio must be 0 or at least 1"),
        ({"early_stopping_patience": 2}, "needs --validation_fraction or --test_file"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(settings, flags, message):
    with pytest.raises(ValueError, match=message):
        simulate(settings(**flags), View(1))
