"""The resident trainer: a closed set of operations, its own paths, codes instead of texts."""

import base64
import errno
import json
import re
import socket
import stat
import threading
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedfora.data.clinic import clinic_rows
from fedfora.data.loading import DataError
from fedfora.deployment import client_app, journal, trainer
from fedfora.deployment.client_app import SOCKET, TrainerGoneError, ask
from fedfora.deployment.journal import RUN_NAME
from fedfora.deployment.trainer import BaseError, SettingsError, Trainer, serve, word_for
from fedfora.federated.wire.messages import FrozenFactorsMissingError
from fedfora.privacy.ledger import BudgetSpent

SETTINGS = {
    "quantization": "none",
    "lora_rank": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_rounds": 2,
    "local_steps": 1,
    RUN_NAME: "clinics/001",
}
QUESTION = {"ask": ConfigRecord({"adapter": True})}


@pytest.fixture(scope="module")
def site(tmp_path_factory, tiny_dir):
    """A trainer that listens, and its directory, whose path is too long for a socket's own."""
    place = tmp_path_factory.mktemp("site")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in clinic_rows()[:12]))
    state = place / ("a-long-name-" * 12) / "state"
    own = {"train_file": str(rows), "model_name_or_path": tiny_dir}
    working = Trainer("cardiology", 1, own, state)
    threading.Thread(
        target=serve, args=(working,), kwargs={"max_bytes": 1 << 20}, daemon=True
    ).start()
    ask(state, {"operation": "none, but it listens"}, RecordDict(), connect_s=30)
    return working


def told(site, operation, settings=None, run=1, **records):
    head = {"operation": operation, "run": run, "settings": {**SETTINGS, **(settings or {})}}
    return ask(site.state, head, RecordDict(records))


def word(head):
    return re.fullmatch(r"site-error ([A-Z_]+) [0-9a-f]{6}", head[client_app.CODE])[1]


def test_only_its_own_user_may_open_the_socket(site):
    mode = (site.state / SOCKET).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_not_for_a_moment_may_another_user_open_the_socket(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "chmod", lambda *args: None)
    with trainer._listening(tmp_path):
        assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600


def test_it_says_who_it_is_and_keeps_its_rows_to_itself(site):
    head, content = told(site, "describe", **QUESTION)
    assert head == {}
    assert (content["site"]["name"], content["site"]["index"]) == ("cardiology", 1)
    assert content["site"]["rows"] == 12
    assert "fresh" in content
    base = json.loads(content["form"]["record"])["base"]["name"]
    assert base == Path(site.own["model_name_or_path"]).name  # where it lies is nobody's business


def test_it_trains_and_the_base_stays_loaded(site, monkeypatch):
    _, described = told(site, "describe", **QUESTION)
    monkeypatch.setattr(
        "fedfora.federated.site_runtime.load_base", None
    )  # it would be an error to call it
    config = {"round-index": 0, "rule": "fedavg", "rank": 2, "frozen-digest": ""}
    question = {"arrays": described["fresh"], "config": ConfigRecord(config)}
    head, content = told(site, "train", **question)
    assert head == {}
    assert content["metrics"]["steps"] == 1
    assert content["origin"]["round_number"] == 1


def test_a_coordinators_sample_of_less_than_a_row_is_refused_before_anything_is_paid(site, caplog):
    private = {"privacy_unit": "record", "target_epsilon": 8.0, "sampling_rate": 1e-17}
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}  # nobody's choice
    head, _ = told(site, "describe", {**private, **batch}, **QUESTION)
    assert word(head) == "DESCRIBE"
    assert "--sampling_rate 1e-17 is less than one of 12 rows" in caplog.text
    assert not (site.state / "privacy").exists()


def asking(site, directory):
    """A trainer in the kit of a directory, and what asks it for the first round of run 1."""
    working = Trainer("cardiology", 1, site.own, directory / "state")
    working.state.mkdir()
    fresh = told(site, "describe", **QUESTION)[1]["fresh"]

    def asked(config=None, **settings):
        head = {"operation": "train", "run": 1, "settings": {**SETTINGS, **settings}}
        known = {"round-index": 0, "rule": "fedavg", "rank": 2, "frozen-digest": ""}
        known |= config or {}
        return working.answer(head, RecordDict({"arrays": fresh, "config": ConfigRecord(known)}))

    return working, asked


@pytest.mark.parametrize(
    ("policy", "config", "expected"),
    [
        ("rank: 1", {}, "POLICY_RANK"),
        ("rank: 2", {"rank": 4}, "POLICY_RANK"),
        ("rules: fedavg", {"rule": "core"}, "POLICY_RULES"),
        ("rounds: 2", {}, "POLICY_ROUNDS"),
        ("until: 2026-01-31", {}, "POLICY_UNTIL"),
        ("base: ['0123456789abcdef0123456789abcdef']", {}, "POLICY_BASE"),
        ("rouns: 3", {}, "POLICY_FILE"),
    ],
)
def test_a_policy_holds_for_settings_message_and_past_and_is_read_at_every_message(
    site, tmp_path, policy, config, expected
):
    """Without it the same question is answered; only the base has to be opened to be known."""
    working, asked = asking(site, tmp_path)
    for number in range(2):  # rounds that it has answered, in another run
        journal.append(working.state, journal.SENT, id=f"q{number}", operation="train")
    (tmp_path / "policy.yaml").write_text(policy + "\n")
    refusal, content = asked(config=config)
    assert word(refusal) == expected
    assert not content
    assert (working.state / trainer.LAST_RUN).exists() is (expected == "POLICY_BASE")
    (tmp_path / "policy.yaml").unlink()
    answer, content = asked()
    assert answer == {}
    assert content["metrics"]["steps"] == 1


def test_no_answer_leaves_that_the_journal_does_not_hold(site, monkeypatch):
    """Neither where the disk is full: then a code is all that leaves, and always the same one."""
    message = Message(RecordDict(QUESTION), dst_node_id=1, message_type="query")
    message.metadata.__dict__["_message_id"] = "q1"
    context = Context(1, 1, {client_app.TRAINER: str(site.state)}, RecordDict(), SETTINGS)
    reply = client_app.forward("describe", message, context)
    line = journal.read_journal(site.state)[-1]
    assert (line["event"], line["id"]) == (journal.SENT, "q1")
    assert line["digest"] == reply.content.object_id

    def full(*args, **values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "append", full)
    for operation in ("describe", "nothing that the trainer knows"):
        reply = client_app.forward(operation, message, context)
        assert not reply.has_content()
        assert re.fullmatch(r"site-error DISK [0-9a-f]{6}", reply.error.reason)


def test_a_runs_settings_are_written_down_whatever_an_earlier_run_was_called(site, tmp_path):
    """Their digest in a name does not pass for them."""
    digest = client_app._written_down(tmp_path / "elsewhere", {"local_steps": 1000})
    client_app._written_down(tmp_path, {RUN_NAME: f'"digest": "{digest}"'})
    for _ in range(2):
        assert client_app._written_down(tmp_path, {"local_steps": 1000}) == digest
    lines = journal.read_journal(tmp_path)
    assert [line["settings"].get("local_steps") for line in lines] == [None, 1000]


@pytest.mark.parametrize("operation", ["quit", "exec", "", None, "__class__", "query"])
def test_other_operations_are_refused(site, operation):
    """Before anything else is looked at."""
    head, content = told(site, operation, {"lora_rank": "no number"})
    assert word(head) == "MESSAGE"
    assert not content


def test_a_coordinator_plants_no_rows_where_nothing_was_promised_either(site):
    assert word(told(site, "describe", {"canaries": 4, "canary_site": 1}, **QUESTION)[0]) == (
        "SETTINGS"
    )


@pytest.mark.parametrize("name", ["train_file", "output-dir", "model_name_or_path", "resume"])
def test_no_setting_of_the_coordinator_chooses_a_path(site, name):
    head, _ = told(site, "describe", {name: "/etc/passwd"}, **QUESTION)
    assert word(head) == "SETTINGS"


def test_a_runs_name_chooses_no_path(site):
    names = ["clinics/001", "../../../../tmp/elsewhere", "/tmp/elsewhere", ".", ""]
    places = {
        Path(site._settings({**SETTINGS, RUN_NAME: name}, "1")["output_dir"]) for name in names
    }
    assert {place.parent for place in places} == {site.state / "runs"}
    assert len({place.resolve() for place in places}) == len(names)
    assert all(re.fullmatch("[0-9a-f]{16}", place.name) for place in places)


def test_what_was_checked_is_what_is_done_though_the_run_had_other_settings_before(site, tmp_path):
    """A policy that was made stricter holds at once: the first message's settings are not kept."""
    _, asked = asking(site, tmp_path)
    assert asked(local_steps=2)[1]["metrics"]["steps"] == 2
    (tmp_path / "policy.yaml").write_text("steps: 1\n")
    assert word(asked(local_steps=2)[0]) == "POLICY_STEPS"
    assert asked(local_steps=1)[1]["metrics"]["steps"] == 1


def test_messages_that_come_together_do_not_get_more_rounds_than_are_allowed(site, tmp_path):
    """The line in the journal is another process's, which may write it after the next message."""
    _, asked = asking(site, tmp_path)
    (tmp_path / "policy.yaml").write_text("rounds: 2\n")
    codes = [head and word(head) for head, _ in (asked(), asked(), asked())]
    assert codes == [{}, {}, "POLICY_ROUNDS"]


def test_a_wrong_setting_is_refused_and_nothing_of_it_comes_back(site):
    head, _ = told(site, "describe", {"lora_rank": "John Doe"}, **QUESTION)
    assert word(head) == "SETTINGS"
    assert "John" not in json.dumps(head)


def test_a_message_that_is_too_long_is_refused_and_the_next_one_answered(site):
    head, _ = told(site, "describe", a=ConfigRecord({"b": "x" * (2 << 20)}))
    assert word(head) == "MESSAGE"
    assert told(site, "describe", **QUESTION)[0] == {}


def test_a_connection_that_says_nothing_does_not_keep_others_waiting(site, monkeypatch):
    monkeypatch.setattr(trainer, "SILENCE_S", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        with client_app.socket_path(site.state) as path:
            silent.connect(path)
        head, _ = ask(site.state, {"operation": "none"}, RecordDict(), answer_s=60)
    assert word(head) == "MESSAGE"


def test_another_base_than_the_kit_asks_for_is_refused(site, tmp_path):
    other = Trainer("x", 0, site.own, tmp_path, base_fingerprint="0" * 32)
    head = {"operation": "describe", "run": 1, "settings": SETTINGS}
    assert word(other.answer(head, RecordDict(QUESTION))[0]) == "BASE"


def test_a_second_trainer_in_the_same_place_is_refused(site):
    with pytest.raises(ValueError, match="already runs"):
        serve(Trainer("y", 0, site.own, site.state))


def test_no_trainer_is_an_error_that_names_the_place(tmp_path):
    with pytest.raises(TrainerGoneError, match=str(tmp_path)):
        ask(tmp_path, {}, RecordDict(), connect_s=0.1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "Jane Roe"), "DISK"),
        (client_app.WireError("Jane Roe"), "MESSAGE"),
        (SettingsError("Jane Roe"), "SETTINGS"),
        (BaseError("Jane Roe"), "BASE"),
        (DataError("Jane Roe"), "DATA"),
        (FrozenFactorsMissingError("Jane Roe"), "FACTORS"),
        (BudgetSpent("Jane Roe"), "BUDGET"),
        (MemoryError("Jane Roe"), "MEMORY"),
        (torch.OutOfMemoryError("Jane Roe"), "MEMORY"),
        (RuntimeError("Jane Roe"), "TRAIN"),
        (KeyError("Jane Roe"), "TRAIN"),
    ],
)
def test_an_error_becomes_a_code_and_its_text_stays_in_the_log(
    site, monkeypatch, caplog, error, expected
):
    def fail(*args):
        raise error

    monkeypatch.setattr(site, "_do", fail)
    head, content = site.answer({"operation": "train"}, RecordDict())
    assert word(head) == expected
    assert set(head) == {client_app.CODE}
    assert not content
    assert "Jane Roe" in caplog.text
    assert head[client_app.CODE] in caplog.text
    assert word_for(error, "train") == expected


def test_a_code_that_is_none_does_not_pass():
    assert client_app.validated_code("site-error TRAIN 0a1b2c") == "site-error TRAIN 0a1b2c"
    for text in ("Jane Roe", "site-error JANE 0a1b2c", "site-error TRAIN 0a1b2c Jane"):
        assert re.fullmatch(r"site-error MESSAGE [0-9a-f]{6}", client_app.validated_code(text))


def test_operations_and_words_cover_each_other():
    assert {name.upper() for name in trainer.OPERATIONS} <= set(client_app.CODES)


@pytest.fixture
def private(tmp_path, tiny_dir):
    """A site whose kit promises epsilon 1, and what asks it for a round."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in clinic_rows()[:12]))
    own = {"train_file": str(rows), "model_name_or_path": tiny_dir, "privacy_unit": "record"}
    own |= {"target_epsilon": 1.0, "target_delta": 1e-5, "clipping_norm": 1.0}
    (tmp_path / "state").mkdir()
    working = Trainer("cardiology", 0, own, tmp_path / "state")

    def asked(run, **settings):
        merged = {**SETTINGS, RUN_NAME: str(run), **settings}
        head, described = working.answer(
            {"operation": "describe", "run": run, "settings": merged}, RecordDict(QUESTION)
        )
        if client_app.CODE in head:
            return word(head)
        arrays = described["fresh"]
        config = {"round-index": 0, "rule": "fedavg", "rank": 2, "frozen-digest": ""}
        content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
        head, content = working.answer(
            {"operation": "train", "run": run, "settings": merged}, content
        )
        asked.sent, asked.content = arrays, content
        return word(head) if client_app.CODE in head else None

    return working, asked


def test_a_coordinator_states_no_noise_and_plants_no_rows(private):
    working, asked = private
    assert asked(11, noise_multiplier=0.0) == "SETTINGS"
    assert asked(12, noise_multiplier=9999.0) == "SETTINGS"
    assert asked(13, canaries=4, canary_copies=2) == "SETTINGS"
    assert not (working.state / "privacy").exists()


READ_OTHERWISE = {
    **{"response_column": "relation", "instruction_column": "note", "history_column": "note"},
    **{"prompt_column": "relation", "task": "medical-dialogue", "template": "plain"},
    **{"source_prefix": "a " * 1500, "max_source_length": 100_000, "max_target_length": 100_000},
}


def test_a_coordinator_asks_rows_no_question_by_how_they_are_read(private):
    """A row without the column, or too long behind the prefix, was an error: paid for by nobody."""
    working, asked = private
    for number, (name, value) in enumerate(READ_OTHERWISE.items()):
        assert asked(20 + number, **{name: value}) == "SETTINGS"
    assert not (working.state / "privacy").exists()


def test_what_a_promise_rests_on_is_fixed_where_its_kit_was_written_by_hand(private):
    working, asked = private
    for name in ("target_delta", "clipping_norm"):
        del working.own[name]
    secure = {"secure_aggregation": True, "weighting": "equal"}
    assert asked(31, target_delta=0.05) == "SETTINGS"
    assert asked(32, clipping_norm=9.0) == "SETTINGS"
    assert asked(33, shared_noise=True, **secure) == "SETTINGS"
    working.own["secure_aggregation"] = True
    assert asked(34, secagg_threshold=0.51, **secure) == "SETTINGS"
    assert asked(35, secagg_min_sites=3, **secure) == "SETTINGS"
    del working.own["secure_aggregation"], working.own["target_epsilon"]
    working.own |= {"noise_multiplier": 1.0, "target_delta": 1e-5, "clipping_norm": 1.0}
    assert asked(36) == "SETTINGS"  # else as many rounds as it asks for
    assert not (working.state / "privacy").exists()


def test_a_coordinator_gets_nothing_beyond_the_budget(private):
    """Failing first, with much noise planned, then asking again for more: each is paid for."""
    from fedfora.privacy.ledger import Ledger

    working, asked = private
    path = working.state / "privacy" / "site.json"
    assert asked(1, num_rounds=2000, optim="adamw_8bit") in ("TRAIN", "BASE", "DATA", "DESCRIBE")
    assert asked(2, num_rounds=1, local_steps=10) is None
    ledger = Ledger.open(path, delta=1e-5, target_epsilon=1.0)
    assert sum(release.count for release in ledger.releases) >= 10
    assert 0.9 < ledger.epsilon <= 1
    assert asked(3, num_rounds=1, local_steps=10) == "BUDGET"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError])
def test_after_payment_a_failure_that_depends_on_rows_changes_no_answer(
    private, monkeypatch, error
):
    """Of the sums, the samples, the loader: its word, or that an answer is none, told of a row."""
    from fedfora.training import dp_sgd

    working, asked = private
    settings = {"num_rounds": 2, "warmup_ratio": 0.0}
    settings["per_device_train_batch_size"] = 12  # every row is in every sample
    collate = dp_sgd.collate

    def guarded(rows):
        if rows:
            raise error("this row is here")
        return collate(rows)

    assert asked(1, **settings) is None
    usual = asked.content
    monkeypatch.setattr(dp_sgd, "collate", guarded)
    assert asked(2, **settings) is None
    noise = asked.content
    assert noise["metrics"] == usual["metrics"]
    assert noise["arrays"].count_bytes() == usual["arrays"].count_bytes()
    assert noise["arrays"].object_id not in (usual["arrays"].object_id, asked.sent.object_id)
    ledger = json.loads((working.state / "privacy" / "site.json").read_text())
    assert [line["count"] for line in ledger["releases"]] == [1, 1]


NUM_SITES = 6


@pytest.fixture
def in_secret(tmp_path, tiny_dir):
    """A function that starts a site whose kit asks for secure aggregation, and one that invites."""
    from fedfora.federated.secure_aggregation.client import Memory, SecureSite
    from fedfora.federated.secure_aggregation.crypto import Identity, SignedKey
    from fedfora.federated.secure_aggregation.messages import Terms, digest_of
    from fedfora.federated.wire.secure_records import ANSWER, ROSTER, TERMS, read, write
    from fedfora.protection.keys import make_signing_key, read_signing_key

    make_signing_key(tmp_path / "site.key")
    others = {index: Identity.generate() for index in range(1, NUM_SITES)}
    private = read_signing_key(tmp_path / "site.key").private_bytes_raw()
    pinned = {0: Identity(private).public_bytes}
    pinned |= {index: identity.public_bytes for index, identity in others.items()}
    encoded = {index: base64.b64encode(key).decode() for index, key in pinned.items()}
    (tmp_path / "sites.json").write_text(json.dumps(encoded))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in clinic_rows()[:12]))
    own = {"train_file": str(rows), "model_name_or_path": tiny_dir, "secure_aggregation": True}
    own["secagg_threshold"] = 0.66
    keys = (tmp_path / "site.key", tmp_path / "sites.json")
    (tmp_path / "state").mkdir(exist_ok=True)

    def started():
        return Trainer("cardiology", 0, own, tmp_path / "state", keys)

    def invited(working, run, participants=range(NUM_SITES), number=1, **settings):
        head = {"run": run, "settings": {**SETTINGS, **settings}}
        refusal, content = working.answer({**head, "operation": "introduce"}, RecordDict())
        if refusal:
            return word(refusal)
        roster = {0: read(SignedKey, content[ANSWER])}
        for index, identity in others.items():
            member = SecureSite(index, identity, pinned, Memory())
            roster[index] = member.introduce(str(run))
        terms = Terms(number, tuple(participants), 0.66, digest_of(roster))
        asked = RecordDict({ROSTER: write(roster), TERMS: write(terms)})
        refusal, _ = working.answer({**head, "operation": "share"}, asked)
        return word(refusal) if refusal else None

    return started, invited


def test_a_site_takes_part_in_a_round_once_though_it_was_restarted(in_secret):
    started, invited = in_secret
    assert invited(started(), 1) is None
    for participants in (range(NUM_SITES), range(5)):
        assert invited(started(), 1, participants) == "SHARE"
    working = started()
    assert invited(working, 1, number=2) is None
    assert invited(working, 2) is None
    assert list(working._contexts) == [2]  # the keys of another run are forgotten


def test_a_coordinator_does_not_say_how_few_sites_are_enough(in_secret):
    """A kit that names no number asks for the threshold's share of all sites that it knows."""
    started, invited = in_secret
    assert invited(started(), 1, participants=range(3), secagg_min_sites=3) == "SETTINGS"
    assert invited(started(), 2, participants=range(3), clients_per_round=3) == "SHARE"
    assert invited(started(), 3, participants=range(4)) is None


UNBOUND = ("task", "source_prefix", *(f"{n}_column" for n in ("prompt", "response", "instruction")))


def test_a_coordinator_does_not_let_one_sites_rows_be_read_otherwise_than_the_others(in_secret):
    """No digest holds how rows are read, as sites may say it: the masks of sites whose rows have a
    prefix, under which the adapter learns nothing, would cancel with those of their victim."""
    started, invited = in_secret
    for number, name in enumerate((*UNBOUND, "history_column"), 1):
        assert invited(started(), number, **{name: "triples"}) == "SETTINGS"
    working = started()
    working.own["source_prefix"] = "Notes: "
    assert invited(working, 9, source_prefix="another") is None  # its own holds


def test_a_site_that_keeps_its_update_secret_judges_no_adapter_in_clear(in_secret):
    """A loss on one adapter after another would tell its rows."""
    started, _ = in_secret
    working, head = started(), {"run": 1, "settings": SETTINGS}
    _, described = working.answer({**head, "operation": "describe"}, RecordDict(QUESTION))
    config = ConfigRecord({"round-index": 0, "rule": "fedavg", "rank": 2, "frozen-digest": ""})
    question = RecordDict({"arrays": described["fresh"], "config": config})
    for operation in ("train", "evaluate"):
        refusal, content = working.answer({**head, "operation": operation}, question)
        assert word(refusal) == operation.upper()
        assert not content
