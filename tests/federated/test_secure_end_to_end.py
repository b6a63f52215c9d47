"""Secure aggregation in a whole federation: the plain mean, and no message that tells more."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message

import strange_bytes
from fedfora.federated import embedded
from fedfora.federated.aggregation import RULES
from fedfora.federated.coordinator.handshake import Membership
from fedfora.federated.embedded import EmbeddedGrid
from fedfora.federated.secure_aggregation.client import SecureSite
from fedfora.federated.secure_aggregation.crypto import Identity
from fedfora.federated.secure_aggregation.messages import round_context, run_context
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import simulate
from fedfora.federated.site import client_app, secure_answers
from fedfora.federated.site.identity import simulated_identity
from fedfora.models.saving import read_adapter
from fedfora.reporting.view import View

LINEAR = [name for name in RULES if RULES[name].mean_of == "factors"]
SITES = ["cardiology", "dermatology", "neurology", "gastroenterology"]


@pytest.fixture
def flags(tiny_dir):
    """Flags of a run of seconds."""
    return {
        "model_name_or_path": tiny_dir,
        "quantization": "none",
        "train_file": "clinic",
        "partition": "by-column:specialty",
        "lora_rank": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "num_rounds": 2,
        "local_steps": 1,
    }


@pytest.fixture
def run(flags, tmp_path):
    """A function that simulates with some flags, and returns the rounds and the adapter."""

    def simulated(name="secure", *, secure=True, **more):
        out = tmp_path / name
        settings = {**flags, "output_dir": str(out), "secure_aggregation": secure, **more}
        return simulate(from_run_config(settings), View(1)), read_adapter(out)

    return simulated


def test_the_rules_that_need_only_a_sum_are_those_that_average():
    assert {"fedavg", "core", "ffa"} <= set(LINEAR)
    assert "refactor" not in LINEAR


@pytest.mark.parametrize("rule", LINEAR)
def test_every_averaging_rule_comes_to_the_plain_mean(run, rule):
    """The first round differs by rounding alone: what sites train from is the same."""
    plain_rounds, plain = run("plain", secure=False, aggregation=rule, num_rounds=1)
    rounds, hidden = run("secure", aggregation=rule, num_rounds=1)
    line = rounds[0]["secure_aggregation"]
    for name, value in plain.items():
        assert (value - hidden[name]).abs().max() <= line["largest_error"] + 1e-7
    assert line["weight"] == sum(site["answer_tokens"] for site in plain_rounds[0]["sites"])
    assert rounds[0]["loss"] == pytest.approx(plain_rounds[0]["loss"], abs=1e-4)
    assert line["clipped_numbers"] == line["shortened_updates"] == 0
    assert line["largest_error"] <= 1e-5


@pytest.mark.parametrize("weighting", ["rows", "equal"])
def test_other_weights_come_to_the_plain_mean_too(run, weighting):
    _, plain = run("plain", secure=False, weighting=weighting, num_rounds=1)
    _, hidden = run("secure", weighting=weighting, num_rounds=1, max_weight=10_000)
    assert all((value - hidden[name]).abs().max() <= 1e-6 for name, value in plain.items())


def test_a_resumed_run_comes_to_the_same_bits(run, tmp_path, flags):
    _, whole = run("whole", num_rounds=3)
    settings = {**flags, "output_dir": str(tmp_path / "whole"), "secure_aggregation": True}
    for kept in (tmp_path / "whole" / "round-003", tmp_path / "whole" / "best"):
        if kept.exists():
            for path in kept.iterdir():
                path.unlink()
            kept.rmdir()
    resumed = from_run_config({**settings, "num_rounds": 3, "resume": str(tmp_path / "whole")})
    simulate(resumed, View(1))
    again = read_adapter(tmp_path / "whole")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


class Wire:
    """Everything that passes between the coordinator and the sites."""

    def __init__(self, monkeypatch):
        self.asked, self.answered = [], []
        original = embedded.EmbeddedGrid._deliver

        def deliver(grid, message):
            self.asked.append(message)
            reply = original(grid, message)
            self.answered.append((message.metadata.message_type, reply))
            return reply

        monkeypatch.setattr(embedded.EmbeddedGrid, "_deliver", deliver)

    def of(self, kind):
        return [reply for asked, reply in self.answered if asked == kind]


def test_no_message_of_a_site_tells_its_update_its_counts_or_its_loss(run, monkeypatch):
    wire = Wire(monkeypatch)
    updates, original = [], secure_answers.contribution

    def spy(update_N, **rest):
        updates.append(update_N.copy())
        return original(update_N, **rest)

    monkeypatch.setattr(secure_answers, "contribution", spy)
    rounds, _ = run()
    assert {kind for kind, _ in wire.answered} == {
        *("query", "query.introduce", "query.share", "train", "query.confirm", "query.reveal")
    }
    for reply in wire.of("query"):
        assert reply.content["site"]["rows"] == 0
    assert len(wire.of("train")) == len(updates) == 8
    for reply, update in zip(wire.of("train"), updates, strict=True):
        assert set(reply.content) == {"arrays", "origin"}
        words = reply.content["arrays"]["words"].numpy()
        assert words.dtype == np.uint32
        seen = words[: len(update)].view(np.int32).astype(float)
        assert abs(np.corrcoef(seen, update)[0, 1]) < 0.1
    for line in rounds:
        assert all(
            set(site) == {"site", "uplink_bytes", "downlink_bytes"} for site in line["sites"]
        )


def test_three_exchanges_come_on_top_and_keys_are_asked_for_once(run, monkeypatch):
    wire = Wire(monkeypatch)
    run(num_rounds=3)
    assert len(wire.of("query.introduce")) == 4
    for kind in ("query.share", "train", "query.confirm", "query.reveal"):
        assert len(wire.of(kind)) == 12
    rosters = [
        "roster" in m.content for m in wire.asked if m.metadata.message_type == "query.share"
    ]
    assert rosters == [True] * 4 + [False] * 8


def test_uplink_is_the_update_and_little_more(run):
    plain_rounds, _ = run("plain", secure=False, num_rounds=1, lora_rank=16)
    rounds, _ = run("secure", num_rounds=1, lora_rank=16)
    plain, hidden = (r[0]["sites"][0]["uplink_bytes"] for r in (plain_rounds, rounds))
    assert plain > 100_000
    assert hidden <= 1.1 * plain


def test_sampled_sites_share_with_those_of_their_round(run):
    rounds, _ = run(partition="iid", num_clients=6, clients_per_round=4, num_rounds=3)
    assert len({tuple(site["site"] for site in line["sites"]) for line in rounds}) > 1


@pytest.mark.parametrize("when", ["share", "train", "confirm", "reveal"])
def test_the_round_goes_on_without_a_site_that_fails(run, monkeypatch, when, tmp_path):
    _failing(monkeypatch, when, "neurology", rounds={1})
    rounds, _ = run(num_rounds=3)
    left = [site for site in SITES if site != "neurology"]
    gone = rounds[0]
    assert [site["site"] for site in gone["sites"]] == (
        SITES if when in ("confirm", "reveal") else left
    )
    assert [entry["site"] for entry in gone["rejected"]] == ["neurology"]
    assert [site["site"] for site in rounds[2]["sites"]] == SITES


def test_the_sum_without_a_failed_site_is_the_mean_of_the_others(run, monkeypatch):
    _failing(monkeypatch, "train", "neurology", rounds={1})
    _, plain = run("plain", secure=False, num_rounds=1)
    _, hidden = run("secure", num_rounds=1)
    assert all((value - hidden[name]).abs().max() <= 1e-6 for name, value in plain.items())


def test_with_too_few_sites_the_run_stops_with_the_reasons(run, monkeypatch):
    _failing(monkeypatch, "train", "neurology", rounds={2})
    _failing(monkeypatch, "train", "cardiology", rounds={2})
    with pytest.raises(ValueError, match="round 2: secure aggregation: 2 of 4 sites sent"):
        run(num_rounds=2)


def test_a_restarted_site_is_asked_for_a_new_key_and_takes_part_again(run, monkeypatch):
    wire = Wire(monkeypatch)
    original = client_app.carry_out

    def forgetful(runtime, site, assignment, state, **rest):
        if site.name == "neurology" and assignment.round_index == 0:
            state.pop(secure_answers.STATE)
        return original(runtime, site, assignment, state, **rest)

    monkeypatch.setattr(client_app, "carry_out", forgetful)
    rounds, _ = run(num_rounds=3)
    assert ["neurology" in [s["site"] for s in line["sites"]] for line in rounds] == [
        *(False, False, True)
    ]
    assert len(wire.of("query.introduce")) == 5


@pytest.mark.parametrize("what", ["base", "adapter", "settings"])
def test_a_site_that_is_given_something_else_than_the_others_is_not_uncovered(
    run, monkeypatch, what
):
    original = secure_answers.wire.digest_of_task
    seen = []

    def inconsistent(rule, base, received, run_config):
        seen.append(rule)
        if len(seen) == 2 and what == "base":
            base = "another"
        if len(seen) == 2 and what == "adapter":
            received = {name: value + 1e-3 for name, value in received.items()}
        if len(seen) == 2 and what == "settings":
            run_config = {**run_config, "learning_rate": 0.0}
        return original(rule, base, received, run_config)

    monkeypatch.setattr(secure_answers.wire, "digest_of_task", inconsistent)
    with pytest.raises(ValueError, match="round 1: secure aggregation: the sum makes no sense"):
        run()


@pytest.mark.parametrize("bytes_", strange_bytes.ALL)
def test_words_that_are_no_array_cost_their_site_the_round_and_not_the_run(run, misbehave, bytes_):
    def behave(honest, message, context):
        content = honest(message, context).content
        words = content["arrays"]["words"]
        strange = Array(words.dtype, words.shape, words.stype, strange_bytes.ALL[bytes_])
        content["arrays"] = ArrayRecord({"words": strange})
        return Message(content, reply_to=message)

    misbehave(behave, from_round=2)
    (_, second), _ = run()
    ((site, reason),) = [entry.values() for entry in second["rejected"]]
    assert (site, bool(reason)) == ("neurology", True)
    assert len(second["sites"]) == 3


def test_out_of_range_numbers_are_clipped_counted_and_said(run, caplog):
    rounds, _ = run(num_rounds=1, secagg_range=1e-3)
    clipped = rounds[0]["secure_aggregation"]["clipped_numbers"]
    assert clipped > 0
    assert f"clipped: {clipped}\n" in caplog.text


def test_every_site_shortens_its_own_update(run, tiny_dir):
    rounds, short = run("short", num_rounds=1, max_update_norm=1e-3)
    assert rounds[0]["secure_aggregation"]["shortened_updates"] == 4
    _, fresh = run("fresh", num_rounds=1, max_update_norm=1e-9)
    moved = sum(float((value - fresh[name]).square().sum()) for name, value in short.items())
    assert 1e-4 < moved**0.5 <= 1.001e-3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"aggregation": "refactor"}, "--aggregation refactor needs every site's own update"),
        ({"aggregation": "refactor"}, "use one of core, fedavg"),
        ({"robust": "median"}, "--robust median needs every site's own update"),
        ({"update_dtype": "int8"}, "--update_dtype int8 needs"),
        ({"validation_fraction": 0.1}, "--validation_fraction"),
        ({"max_norm_ratio": 3.0}, "--max_norm_ratio compares single updates"),
        ({"weighting": "rows"}, "needs --max_weight"),
        ({"secagg_threshold": 0.5}, r"--secagg_threshold must be in \(0.5, 1\]"),
        ({"secagg_min_sites": 2}, "--secagg_min_sites must be at least 3, got 2"),
        ({"secagg_min_sites": 5}, "--secagg_min_sites 5: a round has only 4 sites"),
        ({"secagg_range": 0.0}, "--secagg_range must be above 0"),
        ({"partition": "iid", "num_clients": 2}, "only 2 sites, at least 3"),
        ({"clients_per_round": 2}, "only 2 sites, at least 3"),
    ],
)
def test_what_cannot_be_had_together_is_refused_with_the_reason(run, more, message):
    with pytest.raises(ValueError, match=message):
        run(**more)


def test_a_real_site_sends_no_update_in_the_clear(flags, tmp_path):
    from flwr.app import Context, RecordDict

    context = Context(1, 1, {"partition-id": 0, "site-keys": "keys.json"}, RecordDict(), {})
    with pytest.raises(ValueError, match="sends no update without --secure_aggregation"):
        secure_answers.check_in_clear(context)
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    secure_answers.check_in_clear(context)


def _failing(monkeypatch, when, name, rounds):
    """Let a site raise at one point of some rounds."""
    module, what = {
        "share": (secure_answers, "share"),
        "train": (client_app, "carry_out"),
        "confirm": (secure_answers, "confirm"),
        "reveal": (secure_answers, "reveal"),
    }[when]
    original, seen = getattr(module, what), {"count": 0}

    def fail(*args, **kwargs):
        if when == "train":
            site, number = args[1].name, args[2].round_index + 1
        else:
            site = SITES[int(args[1].node_config["partition-id"])]
            seen["count"] += site == name
            number = seen["count"]
        if site == name and number in rounds:
            raise RuntimeError("disk full")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, what, fail)


def test_a_site_that_hands_out_wrong_shares_costs_one_round_and_takes_no_further_part(
    run, tmp_path, monkeypatch
):
    original = SecureSite.share

    def share(site, terms):
        answer = original(site, terms)
        if site.site == 2 and terms.round_number == 2:
            answer = dataclasses.replace(answer, seed_digest=bytes(32))
        return answer

    monkeypatch.setattr(SecureSite, "share", share)
    rounds, _ = run("out", num_rounds=4)
    assert [line["round"] for line in rounds] == [1, 3, 4]
    assert [len(line["sites"]) for line in rounds] == [4, 3, 3]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["round"] for e in events if e["event"] == "lost"] == [2]
    refused = [e for e in events if e["event"] == "rejected"]
    assert [e["site"] for e in refused] == ["neurology"]
    assert "shares it handed out are wrong" in refused[0]["reason"]


def test_a_site_that_hands_back_wrong_shares_takes_no_further_part(run, tmp_path, monkeypatch):
    original = SecureSite.reveal

    def reveal(site, signatures):
        answer = original(site, signatures)
        if site.site == 2:
            answer.seeds.update(dict.fromkeys(answer.seeds, bytes(32)))
        return answer

    monkeypatch.setattr(SecureSite, "reveal", reveal)
    rounds, _ = run("out", num_rounds=2, secagg_threshold=0.51)
    assert [len(line["sites"]) for line in rounds] == [4, 3]
    ((site, reason),) = _rejected(tmp_path / "out").items()
    assert (site, "shares it handed back are wrong" in reason) == ("neurology", True)


def test_a_site_that_sends_the_key_of_another_is_named_and_the_others_go_on(
    run, tmp_path, monkeypatch
):
    original = SecureSite.introduce

    def introduce(site, asked):
        key = original(site, asked)
        return dataclasses.replace(key, site=1) if site.site == 2 else key

    monkeypatch.setattr(SecureSite, "introduce", introduce)
    rounds, _ = run("out", num_rounds=1)
    assert [len(line["sites"]) for line in rounds] == [3]
    assert _rejected(tmp_path / "out") == {"neurology": "it sent the key of site 1"}


BAD_KEYS = {
    "zeros": bytes(32),
    "order 8": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    "short": b"\x09" * 31,
    "nothing": b"",
}


@pytest.mark.parametrize("kind", BAD_KEYS)
@pytest.mark.parametrize("when", ["introduce", "share"])
def test_a_site_whose_public_key_is_unusable_is_named_and_the_others_go_on(
    run, tmp_path, monkeypatch, when, kind
):
    """It is signed, so only the other sites' key agreement would fail, and they would be named."""
    original = getattr(SecureSite, when)

    def spoiled(site, asked):
        answer = original(site, asked)
        if site.site != 2:
            return answer
        if when == "introduce":
            return site.identity.sign(2, BAD_KEYS[kind], context=run_context(asked))
        key = site.identity.sign(2, BAD_KEYS[kind], context=round_context(asked))
        return dataclasses.replace(answer, key=key)

    monkeypatch.setattr(SecureSite, when, spoiled)
    rounds, _ = run("out", num_rounds=2)
    assert [len(line["sites"]) for line in rounds] == [3, 3]
    assert _rejected(tmp_path / "out") == {
        "neurology": "the public key of site 2 is no usable X25519 key"
    }


def _rejected(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return {
        event["site"]: event["reason"].removeprefix("secure aggregation: ")
        for event in events
        if event["event"] == "rejected"
    }


@pytest.mark.parametrize("when", ["introduce", "share"])
def test_a_site_whose_key_another_identity_signed_is_named_and_the_others_go_on(
    run, tmp_path, monkeypatch, when
):
    pinned = {u: simulated_identity(42, u).public_bytes for u in range(4)}
    monkeypatch.setattr(Membership, "identity", lambda members, index: pinned[index])
    original = getattr(SecureSite, when)

    def spoiled(site, asked):
        stranger = Identity.generate()
        return original(
            dataclasses.replace(site, identity=stranger) if site.site == 2 else site, asked
        )

    monkeypatch.setattr(SecureSite, when, spoiled)
    rounds, _ = run("out", num_rounds=2)
    assert [len(line["sites"]) for line in rounds] == [3, 3]
    ((site, reason),) = _rejected(tmp_path / "out").items()
    assert site == "neurology"
    assert "site 2 is not signed with that site's identity" in reason


def test_a_reply_that_names_another_run_changes_nothing_for_the_others(run, monkeypatch):
    """Flower's SuperLink refuses one; the check of the others' keys must not lean on that."""
    pinned = {u: simulated_identity(42, u).public_bytes for u in range(4)}
    monkeypatch.setattr(Membership, "identity", lambda members, index: pinned[index])
    deliver = EmbeddedGrid._deliver

    def misled(grid, message):
        reply = deliver(grid, message)
        reply.metadata.__dict__["_run_id"] = 99
        return reply

    monkeypatch.setattr(EmbeddedGrid, "_deliver", misled)
    rounds, _ = run("out", num_rounds=1)
    assert [len(line["sites"]) for line in rounds] == [4]
