"""Real processes, TLS, keys and the gate on loopback: the same adapter, and whatever may go wrong.

Most of these take minutes and are run by `make test-deploy`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason='needs pip install "fedfora[privacy]"')

from safetensors.torch import load_file

from bad_site import PATIENT
from fedfora.deployment.journal import disagreements, read_journal
from fedfora.deployment.run import write_app
from real_federation import FLAGS, assert_close, assert_same, needs_nginx

pytestmark = needs_nginx


def assert_finite(directory):
    adapter = load_file(directory / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in adapter.values())


def test_real_sites_give_the_embedded_engines_adapter_to_the_bit(federation, embedded):
    """And nothing stays behind when coordinator and sites are told to end; the journals agree."""
    real = federation(2, quorum=2)
    real.coordinate()
    real.join(*real.names)
    expected = embedded(2)
    assert real.wait() == 0, real.logs()
    assert [len(event["sites"]) for event in real.events("round")] == [2, 2]
    assert_same(real.run_directory, expected)
    for name in real.names:
        assert real.end(name) == 0
    real.until(lambda: not real.pids())
    ours = read_journal(real.kit.state)
    events = {line["event"] for line in ours}
    assert {"started", "run", "let_in", "address", "received", "run_ended"} <= events
    for name in real.names:
        theirs = read_journal(real.site_kit(name) / "state")
        sent = [line for line in theirs if line["event"] == "sent"]
        assert [line["round"] for line in sent if line["operation"] == "train"] == [1, 2]
        assert all(line["bytes"] > 0 for line in sent if line["operation"] == "train")
        (settings,) = [line for line in theirs if line["event"] == "settings"]
        assert settings["settings"]["num_rounds"] == 2
        mine = [line for line in ours if line["event"] == "received" and line["site"] == name]
        assert [line["id"] for line in mine] == [line["id"] for line in sent]
        assert disagreements(ours, theirs) == []


OWN_SITE = """
import sys
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
import fedfora
from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.models.adapter_base import add_adapter
from fedfora.models.loading import load_base
from fedfora.models.settings import AdapterArguments, ModelArguments

kit, model, rows = sys.argv[1:]
base = load_base(ModelArguments(model, quantization="none"))
data = DataArguments()
encoded = encode_examples(
    load_examples(rows, data), base.tokenizer, prompt_format_of(data, base.tokenizer)
)
trainer = Trainer(
    add_adapter(base, AdapterArguments(lora_rank=2), seed=42),
    TrainingArguments(kit + "/own", learning_rate=2e-4, lr_scheduler_type="cosine",
        warmup_steps=0.1, per_device_train_batch_size=2, report_to="none", use_cpu=True),
    train_dataset=encoded,
    data_collator=DataCollatorForSeq2Seq(base.tokenizer, label_pad_token_id=-100),
    processing_class=base.tokenizer,
)
fedfora.federate(trainer, kit=kit)
"""


def test_a_site_with_a_trainer_of_its_own_takes_part_beside_a_built_in_one(
    federation, embedded, rows, tiny_dir
):
    """The same base, start and steps, so the embedded adapter but for the order of additions; a
    lost connection is made again, and nothing stays behind."""
    real = federation(2, quorum=2, learning_rate=2e-4, num_rounds=3)
    own, builtin = real.names
    script = real.place / "own_site.py"
    script.write_text(OWN_SITE)
    real.start(own, str(script), str(real.site_kit(own)), tiny_dir, str(rows[own]))
    real.join(builtin)
    real.until(lambda: real.pids("supernode", own))
    real.kill("supernode", own)
    real.coordinate()
    expected = embedded(2, learning_rate=2e-4, num_rounds=3)
    assert real.wait() == 0, real.logs()
    assert [len(event["sites"]) for event in real.events("round")] == [2, 2, 2]
    assert max(expected[name].abs().max() for name in expected if ".fora_D." in name) > 1e-4
    assert_close(real.run_directory, expected, atol=1e-6)
    for name in real.names:
        assert real.end(name) == 0
    real.until(lambda: not real.pids())


@pytest.mark.deploy
def test_real_sites_add_up_under_the_keys_of_their_kits(federation, embedded):
    """Masks cancel to the bit, so the keys do not show in the adapter; the order of rows, which is
    each site's secret, does in the last digits where a step takes all rows."""
    flags = {"per_device_train_batch_size": 10, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    flags |= {"secure_aggregation": True, "num_rounds": 1}
    real = federation(3, quorum=3, **flags)
    real.coordinate()
    real.join(*real.names)
    assert real.wait() == 0, real.logs()
    (last,) = real.events("round")
    assert len(last["sites"]) == 3
    assert_close(real.run_directory, embedded(3, **flags), atol=1e-4)
    for name in real.names:
        (kept,) = real.place.rglob(f"{name}/**/secure-aggregation.json")
        assert json.loads(kept.read_text())["left"].keys()


@pytest.mark.deploy
def test_a_run_whose_records_hide_losses_comes_to_its_end(federation):
    """Under record privacy no loss leaves a site; the coordinator tells its rounds all the same."""
    private = {"privacy_unit": "record", "target_epsilon": 8.0, "target_delta": 1e-3}
    real = federation(2, quorum=2, **private)
    real.coordinate()
    real.join(*real.names)
    assert real.wait() == 0, real.logs()
    rounds = real.events("round")
    assert len(rounds) == 2
    assert all("loss" not in line for line in rounds)


@pytest.mark.deploy
def test_a_site_that_misbehaves_round_after_round_is_left_out_and_nothing_of_it_leaves(federation):
    """NaN, shape, weight, exception, old reply, a killed trainer; then it is itself again."""
    real = federation(2, num_rounds=8)
    good, rogue = real.names
    real.coordinate()
    real.join(good)
    real.join_badly(
        rogue,
        round_2="nan",
        round_3="shape",
        round_4="weight",
        round_5="exception",
        round_6="replay",
        round_7="die",
    )
    assert real.wait() == 0, real.logs()
    reasons = real.reasons(rogue)
    assert sorted(reasons) == [2, 3, 4, 5, 6, 7]
    assert "finite" in reasons[2]
    assert "weight" in reasons[4] or "answer_tokens" in reasons[4]
    assert "site-error TRAIN " in reasons[5]
    assert "round" in reasons[6]
    assert "site-error TRAINER " in reasons[7] or "no answer" in reasons[7]
    last = real.events("round")[-1]
    assert [site["site"] for site in last["sites"]] == real.names
    assert_finite(real.run_directory)
    assert_said_only_at(real, rogue, PATIENT)


def assert_said_only_at(real, site, text):
    """A text stands in the site's own log, and in no file of the coordinator's."""
    log = real.site_kit(site) / "state" / "logs" / "trainer.log"
    assert text in log.read_text(errors="replace")
    for path in real.kit.directory.rglob("*"):
        if path.is_file():
            assert text.encode() not in path.read_bytes(), path


@pytest.mark.deploy
@pytest.mark.parametrize("fault", ["silence", "stop"])
def test_a_site_that_never_answers_costs_a_round_its_deadline_and_is_soon_back(federation, fault):
    """Its training sleeps, or all of its trainer is stopped; the site's daemon starts another."""
    real = federation(2, num_rounds=1000, round_deadline=30.0)
    good, silent = real.names
    real.coordinate()
    real.join(good)
    real.join_badly(silent, round_2=fault)
    real.until(lambda: 2 in real.reasons(silent))
    real.until(lambda: real.round_reached(2) and len(real.events("round")[-1]["sites"]) == 2)
    assert [site["site"] for site in real.events("round")[1]["sites"]] == [good]
    said = (real.place / "logs" / f"{silent}.log").read_text()
    assert "trainer hangs: no sign of life" in said
    log = real.site_kit(silent) / "state" / "logs" / "trainer.log"
    assert "train, for 30 s at most" in log.read_text()


@pytest.mark.deploy
@pytest.mark.parametrize("victim", ["flower-superlink", "flwr-serverapp"])
def test_a_killed_coordinator_goes_on_from_its_checkpoint_to_the_same_adapter(
    federation, embedded, victim
):
    """The supervisor does so by itself; nobody types anything."""
    real = federation(2, quorum=2, num_rounds=4)
    real.coordinate()
    real.join(*real.names)
    real.until(lambda: real.round_reached(2))
    real.kill(victim)
    assert real.wait() == 0, real.logs()
    assert real.events("resumed")
    assert_same(real.run_directory, embedded(2, num_rounds=4))


@pytest.mark.deploy
def test_a_killed_command_goes_on_when_it_is_typed_again(federation, embedded):
    """Its processes end with it, and the same command takes the run up."""
    real = federation(2, quorum=2, num_rounds=3)
    real.coordinate()
    real.join(*real.names)
    real.until(lambda: real.round_reached(1))
    real.end("coordinator", signal.SIGKILL)
    real.until(lambda: not real.pids(str(real.kit.directory)))
    real.coordinate()
    assert real.wait() == 0, real.logs()
    assert real.events("resumed")
    assert_same(real.run_directory, embedded(2, num_rounds=3))


@pytest.mark.deploy
def test_a_site_that_is_killed_comes_back_and_the_round_goes_on_without_it(federation):
    """The SuperLink takes it back once two of its heartbeats are missing, a minute later."""
    real = federation(2, num_rounds=100, round_deadline=40.0)
    stays, goes = real.names
    real.coordinate()
    real.join(stays, goes)
    real.until(lambda: real.round_reached(1))
    real.kill("supernode", f"sites/{goes}")

    def took_part():
        return [goes in [site["site"] for site in e["sites"]] for e in real.events("round")]

    real.until(lambda: not all(took_part()))
    real.until(lambda: took_part()[-1])
    assert "SuperNode started again" in (real.place / "logs" / f"{goes}.log").read_text()


@pytest.mark.deploy
def test_a_reply_of_600_megabytes_is_refused_and_the_run_goes_on(federation):
    """Random bytes: of equal pieces Flower sends one."""
    real = federation(2, num_rounds=3)
    good, rogue = real.names
    real.coordinate()
    real.join(good)
    real.join_badly(rogue, round_2="big")
    assert real.wait() == 0, real.logs()
    assert 2 in real.reasons(rogue)
    assert len(real.events("round")) == 3
    assert_finite(real.run_directory)


@pytest.mark.deploy
def test_flowers_own_command_starts_a_run_and_code_that_it_sends_is_not_run_at_a_site(federation):
    real = federation(2, quorum=2)
    kit = ["--kit", str(real.kit.directory)]
    real.start("coordinator", "-m", "fedfora", "coordinator", *kit)
    real.join(*real.names)
    app, marker = real.place / "app", real.place / "it-ran"
    shared = {name: value for name, value in FLAGS.items() if name != "start_deadline"}
    write_app(app, {**shared, "start_deadline": 600.0})
    client = app / "fedfora_app" / "client.py"
    client.write_text(f"open({str(marker)!r}, 'w').close()\n" + client.read_text())
    log = real.place / "logs" / "coordinator.log"
    real.until(lambda: log.read_text().count("is let in") == 2)
    home = {"FLWR_HOME": str(real.kit.state / "flower"), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    flwr = Path(sys.executable).with_name("flwr")
    subprocess.run([flwr, "run", app, "fedfora"], env={**os.environ, **home}, check=True)
    attempt = real.kit.state / "attempt.json"
    real.until(lambda: attempt.is_file() and "begun" not in attempt.read_text())
    assert json.loads(attempt.read_text())["status"] == "finished", real.logs()
    assert len(list((real.kit.state / "runs").glob("flwr-*/adapter_model.safetensors"))) == 1
    assert not marker.exists()
