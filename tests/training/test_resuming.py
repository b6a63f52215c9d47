"""Killed or stopped at any step and resumed = uninterrupted, to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedfora.cli.main import main
from fedfora.models.saving import read_adapter
from fedfora.training.trainer import AfterStep

STEPS = 9


@pytest.fixture(scope="module")
def words(tiny_dir, tmp_path_factory):
    """Rows of two and a quarter passes, dropout, warm-up: all that resuming can get wrong."""
    from fedfora.data.clinic import clinic_rows

    rows = tmp_path_factory.mktemp("rows") / "rows.json"
    rows.write_text("\n".join(map(json.dumps, clinic_rows()[:16])))
    return (
        f"train --model_name_or_path {tiny_dir} --quantization none --train_file {rows} "
        "--lora_rank 2 --lora_dropout 0.2 --per_device_train_batch_size 2 --learning_rate 1e-2 "
        "--gradient_accumulation_steps 2 --save_steps 2 --logging_steps 1 --report_to none "
        f"--warmup_ratio 0.3 --max_steps {STEPS} --output_dir "
    ).split()


@pytest.fixture(scope="module")
def uninterrupted(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert main([*words, str(out)]) == 0
    return out


def assert_same_run(out, expected):
    one, other = read_adapter(out), read_adapter(expected)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert losses(out) == losses(expected)
    totals = [[e for e in events(run) if e["event"] == "trained"] for run in (out, expected)]
    (totals,) = zip(*totals, strict=True)
    for name in ("steps", "loss", "tokens", "answer_tokens"):
        assert totals[0][name] == totals[1][name]


def events(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [(e["step"], e["loss"], e["tokens"]) for e in events(out) if e["event"] == "step"]


def validations(out):
    return [(e["step"], e["loss"]) for e in events(out) if e["event"] == "validation"]


def test_killed_and_resumed_is_uninterrupted(words, uninterrupted, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedfora", *words, str(out)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").is_file() and len(losses(out)) >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "adapter_model.safetensors").exists()
    assert main([*words, str(out), "--resume_from_checkpoint", "last"]) == 0
    assert_same_run(out, uninterrupted)


def stop_after(patch, step):
    """Let Ctrl-C be pressed after a step."""
    original = AfterStep.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    patch.setattr(AfterStep, "on_step_end", interrupt)


@pytest.mark.parametrize("step", [1, 4, 8])
def test_stopped_and_resumed_is_uninterrupted(
    words, uninterrupted, tmp_path, monkeypatch, capsys, step
):
    """Ctrl-C finishes the step, saves it, and says how to go on."""
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert main([*words, str(out)]) == 130
    error = capsys.readouterr().err
    assert f"stopped after step {step} of {STEPS}" in error
    assert "--resume_from_checkpoint last" in error
    assert main([*words, str(out), "--resume_from_checkpoint", "last"]) == 0
    assert_same_run(out, uninterrupted)


def test_patience_is_not_forgotten_when_a_training_is_resumed(words, tmp_path, monkeypatch):
    """Losses that do not fall by a whole unit count as no better: the third look ends it."""
    more = [
        "--validation_file",
        "clinic:test",
        "--eval_steps",
        "2",
        "--early_stopping_patience",
        "2",
        "--early_stopping_threshold",
        "1",
    ]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*words, str(whole), *more]) == 0
    assert [step for step, _ in validations(whole)] == [2, 4, 6]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main([*words, str(out), *more]) == 130
    assert main([*words, str(out), *more, "--resume_from_checkpoint", "last"]) == 0
    assert_same_run(out, whole)
    assert validations(out) == validations(whole)


def test_a_half_written_checkpoint_is_not_used(words, uninterrupted, tmp_path):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(uninterrupted, out)
    for newer in ("checkpoint-8", "checkpoint-9"):
        (out / newer / "progress.json").unlink()
    (out / "checkpoint-6" / "trainer_state.json").stat()
    assert main([*words, str(out), "--resume_from_checkpoint", "last"]) == 0
    assert_same_run(out, uninterrupted)


def test_resuming_a_finished_training_changes_nothing(words, uninterrupted, tmp_path):
    before = read_adapter(uninterrupted)
    assert main([*words, str(uninterrupted), "--resume_from_checkpoint", "last"]) == 0
    assert all(torch.equal(before[n], t) for n, t in read_adapter(uninterrupted).items())


def test_last_starts_at_the_beginning_where_nothing_was_saved(words, uninterrupted, tmp_path):
    out = tmp_path / "fresh"
    assert main([*words, str(out), "--resume_from_checkpoint", "last"]) == 0
    assert_same_run(out, uninterrupted)


def test_only_the_newest_checkpoints_are_kept(words, tmp_path):
    out = tmp_path / "few"
    assert main([*words, str(out), "--save_total_limit", "2"]) == 0
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9"]


def test_checkpoints_hold_nothing_that_runs_code(uninterrupted):
    """All `.pt` files open with the weights_only loader; there are no pickled arguments."""
    from transformers.trainer_pt_utils import safe_globals

    files = {p.name for p in (uninterrupted / "checkpoint-4").iterdir()}
    assert files == {
        *("adapter_model.safetensors", "adapter_config.json", "fedfora.json", "README.md"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json"),
    }
    with safe_globals():
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(uninterrupted / "checkpoint-4" / name, weights_only=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--learning_rate 0.1", "learning_rate was 0.01, now it is 0.1"),
        ("--lora_rank 4", "lora_rank was 2, now it is 4"),
        ("--train_file clinic --max_steps 9", "train_file was"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(words, uninterrupted, capsys, change, message):
    before = (uninterrupted / "metrics.jsonl").read_text()
    argv = [*words, str(uninterrupted), *change.split(), "--resume_from_checkpoint", "last"]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert (uninterrupted / "metrics.jsonl").read_text() == before
    assert len(list(uninterrupted.glob("checkpoint-*"))) == 5


def test_a_directory_that_is_no_checkpoint_is_refused(words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "holds no complete checkpoint"), ("none", "does not exist")):
        argv = [*words, str(tmp_path / "out"), "--resume_from_checkpoint", str(tmp_path / name)]
        assert main(argv) == 2
        assert message in capsys.readouterr().err


def test_the_first_interrupt_says_what_happens_now_and_the_second_stops(capfd):
    import signal

    from fedfora.training.local import Interruption

    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked
        assert "finishing this step, then saving; repeat to stop" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt, match="at once, without saving"):
            signal.raise_signal(signal.SIGINT)
