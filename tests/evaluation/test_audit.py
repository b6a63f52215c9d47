"""The attack's score against counting pairs, and the whole audit on a run of a few rows."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfora.cli.main import main
from fedfora.evaluation.audit import UNSEEN, exposure, separation

losses = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=30)


@given(losses, losses)
def test_the_auc_counts_pairs(members, others):
    pairs = [(1.0 if m < o else 0.5 if m == o else 0.0) for m in members for o in others]
    found = separation(torch.tensor(members), torch.tensor(others))
    assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["low"] <= found["auc"] <= found["high"]


def test_rows_of_one_kind_are_not_told_apart_and_rows_of_two_are():
    generator = torch.Generator().manual_seed(0)
    members, others = torch.randn(400, generator=generator), torch.randn(300, generator=generator)
    same = separation(members, others)
    assert same["low"] < 0.5 < same["high"]
    assert separation(members - 1, others)["low"] > 0.6
    known = separation(members - 100, others)
    assert (known["auc"], known["true_positive_rate"]) == (1.0, 1.0)


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="rows that were not"):
        separation(torch.ones(3), torch.ones(0))


def test_an_audit_finds_rows_and_secrets_that_were_trained_on(rows_file, tmp_path, capsys):
    from fedfora.data.clinic import clinic_rows

    rows = clinic_rows()
    trained, held_out = rows_file(rows[:6], "in.json"), rows_file(rows[6:18], "out.json")
    out = tmp_path / "run"
    words = (
        f"train --model_name_or_path clinic-base --quantization none --train_file {trained} "
        f"--output_dir {out} --max_steps 30 --per_device_train_batch_size 10 "
        "--canaries 2 --canary_copies 2 "
        "--gradient_accumulation_steps 1 --learning_rate 0.01 --lr_scheduler_type constant"
    )
    assert main(words.split()) == 0
    assert main(f"audit --run {out}".split()) == 2
    assert "--held_out_file is missing" in capsys.readouterr().err
    few = "--canary_alternatives 63"
    assert main(f"audit --run {out} --held_out_file {held_out} {few}".split()) == 0
    shown = capsys.readouterr().out
    for words in ("adapter", "canaries: 2", "before"):
        assert words in shown
    found = json.loads((out / "audit.json").read_text())
    assert found["adapter"]["auc"] > 0.6
    assert found["adapter"]["loss_in"] < found["base"]["loss_in"]
    assert found["rows"] == [6, 12]
    assert sum(found["canaries"]["before_bits"]) < 10
    assert found["canaries"]["after_bits"] == [6.0, 6.0]


def test_one_run_shows_an_epsilon_that_noise_keeps_down(rows_file, tmp_path):
    from fedfora.data.clinic import clinic_rows

    rows = clinic_rows()
    trained, held_out = rows_file(rows[:6], "in.json"), rows_file(rows[6:12], "out.json")
    found = {}
    for name, words in {
        "open": "--max_steps 60 --per_device_train_batch_size 15 --lr_scheduler_type constant "
        "--gradient_accumulation_steps 1 --learning_rate 0.01",
        "private": "--max_steps 4 --privacy_unit record --target_epsilon 1 --sampling_rate 0.5 "
        f"--privacy_dir {tmp_path / 'ledgers'}",
    }.items():
        same = f"--model_name_or_path clinic-base --quantization none --train_file {trained}"
        out = tmp_path / name
        assert main(f"train {same} --output_dir {out} --canaries 24 {words}".split()) == 0
        audit = f"audit --run {out} --held_out_file {held_out} --canary_alternatives 1"
        assert main(audit.split()) == 0
        found[name] = json.loads((out / "audit.json").read_text())["canaries"]
    assert found["open"]["guessed"] >= 22
    assert found["open"]["epsilon_at_least"] > 1
    assert found["private"]["epsilon_at_least"] < 1


# Exposure against its definition, and of a model that has memorized a code.


@pytest.mark.parametrize("rank", [1, 2, 5, 256])
def test_exposure_is_the_definition(rank):
    losses = torch.arange(256.0)
    losses[0] = rank - 0.5  # of the others, 1 ... 255, rank - 1 are lower
    assert exposure(losses) == pytest.approx(math.log2(256 / rank))


def test_a_model_that_cannot_tell_gives_nothing_away():
    assert exposure(torch.ones(256)) == 0


def test_codes_that_were_never_seen_have_the_stated_bits():
    generator = torch.Generator().manual_seed(0)
    found = [exposure(torch.rand(1000, generator=generator)) for _ in range(2000)]
    assert sum(found) / len(found) == pytest.approx(UNSEEN, abs=0.1)
