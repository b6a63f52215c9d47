"""Record privacy as the user types it: what is spent, said and refused."""

import json

import pytest
import torch

from fedfora.cli.main import main
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.models.saving import read_adapter
from fedfora.privacy.accounting import Release, epsilon_of
from fedfora.reporting.view import View


@pytest.fixture
def words(tiny_dir, rows_file):
    from fedfora.data.clinic import clinic_rows

    rows = rows_file(clinic_rows()[:24])
    return (
        f"train --model_name_or_path {tiny_dir} --quantization none --train_file {rows} "
        "--lora_rank 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
        "--max_steps 3 --output_dir"
    ).split()


def private(words, out, *more):
    return main([*words, str(out), "--privacy_unit", "record", *map(str, more)])


def ledger(out):
    return json.loads((out / "privacy" / "site-000.json").read_text())


def test_a_training_spends_its_budget_and_says_so(words, tmp_path):
    out = tmp_path / "out"
    assert private(words, out, "--target_epsilon", 2) == 0
    spent = ledger(out)
    (release,) = spent["releases"]
    assert (release["sampling_rate"], release["count"]) == (4 / 24, 3)
    assert 1.9 < spent["epsilon"] <= 2
    assert spent["epsilon"] == epsilon_of([Release(**release)], 1e-5)
    card = (out / "README.md").read_text()
    stored = json.loads((out / "fedfora.json").read_text())["privacy"]
    assert stored in card
    for word in ("24 training records", "3 steps", "clipped to 1", "assumed"):
        assert word in stored
    assert "rows_fingerprint" not in json.loads((out / "fedfora.json").read_text())


def test_a_second_training_on_the_same_ledger_is_refused(words, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    place = ("--privacy_dir", tmp_path / "ledgers")
    assert private(words, out, "--target_epsilon", 2, *place) == 0
    assert private(words, other, "--target_epsilon", 2, *place) == 2
    assert "privacy budget does not allow" in capsys.readouterr().err
    assert not (other / "adapter_model.safetensors").exists()
    assert private(words, other, "--target_epsilon", 8, *place) in (0, 2)


def test_a_training_that_is_gone_on_with_pays_once(words, tmp_path):
    """Broken off after a checkpoint: the ledger is what it was for the whole."""
    from fedfora.training.local import PrivateSteps

    out = tmp_path / "out"
    more = ("--target_epsilon", 2, "--save_steps", 1)
    step, taken = PrivateSteps.step, []

    def stops(self, trainer, model, inputs):
        taken.append(1)
        if len(taken) == 3:
            raise RuntimeError("the power went")
        return step(self, trainer, model, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateSteps, "step", stops)
        with pytest.raises(RuntimeError, match="power"):
            private(words, out, *more)
    before = ledger(out)
    assert before["unfinished"]
    assert private(words, out, *more, "--resume_from_checkpoint", "last") == 0
    after = ledger(out)
    assert after["releases"] == before["releases"]
    assert after["unfinished"] is None
    assert private(words, out, *more, "--resume_from_checkpoint", "last") == 2  # it has ended


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target_epsilon", 0), "--target_epsilon must be positive"),
        ((), "--privacy_unit record needs --target_epsilon or --noise_multiplier"),
        (("--noise_multiplier", 1, "--target_delta", 0.5), "--target_delta 0.5 is not below"),
        (("--noise_multiplier", 1, "--clipping_norm", "inf"), "bounds nothing"),
        (("--noise_multiplier", -1), "--noise_multiplier must be at least 0"),
        (("--noise_multiplier", 1, "--fp16", "true"), "--bf16"),
        (("--noise_multiplier", 1, "--privacy_unit", "site"), "train has one"),
    ],
)
def test_what_gives_no_privacy_is_refused_before_a_step(words, tmp_path, capsys, flags, message):
    assert private(words, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.fixture
def federate(tiny_dir, rows_file, tmp_path):
    from fedfora.data.clinic import clinic_rows

    rows = rows_file(clinic_rows()[:24], "federated.json")

    def run(name, **flags):
        settings = from_run_config(
            {
                "model_name_or_path": tiny_dir,
                "quantization": "none",
                "train_file": rows,
                "output_dir": str(tmp_path / name),
                "lora_rank": 2,
                "num_clients": 2,
                "num_rounds": 2,
                "local_steps": 2,
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 1,
                "privacy_unit": "record",
                **flags,
            }
        )
        simulate(settings, View(1))
        return tmp_path / name

    return run


def test_every_site_keeps_its_own_ledger_over_all_rounds(federate):
    out = federate("one", target_epsilon=3.0)
    for site in ("site-000", "site-001"):
        spent = json.loads((out / "privacy" / f"{site}.json").read_text())
        assert [release["count"] for release in spent["releases"]] == [4]
        assert 2.9 < spent["epsilon"] <= 3


def test_a_private_site_tells_nothing_that_depends_on_its_rows(federate, capsys):
    """Token counts and digests are the same whatever the rows are; losses are not there."""
    out = federate("one", noise_multiplier=1.0)
    for line in read_rounds(out):
        assert "loss" not in line
        for site in line["sites"]:
            assert (site["tokens"], site["answer_tokens"]) == (0, 6)
            assert "loss" not in site
    assert "round 2/2    loss      -" in capsys.readouterr().out
    assert all(not site["data_digest"] for site in json.loads((out / "sites.json").read_text()))


def test_noise_makes_two_runs_of_one_seed_differ(federate):
    one, other = (read_adapter(federate(name, noise_multiplier=1.0)) for name in ("one", "other"))
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert any(name.endswith(".D") for name in differing)
