"""Two real processes under every launcher train what one process trains with twice the batches."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedfora.cli.main import main
from fedfora.models.saving import read_adapter
from fedfora.training.preflight import check_deepspeed, stale_locks

CONFIGS = Path(__file__).parents[2] / "configs"
LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --nproc_per_node=2 --master_port={port} -m fedfora",
    "accelerate": (
        "-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 "
        "--mixed_precision=no --dynamo_backend=no --main_process_port={port} -m fedfora"
    ),
    "fsdp": (
        "-m accelerate.commands.launch --num_processes=2 --num_machines=1 --mixed_precision=no "
        "--dynamo_backend=no --main_process_port={port} --use_fsdp --fsdp_version=2 "
        "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP -m fedfora"
    ),
}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason='needs DeepSpeed: DS_BUILD_OPS=0 pip install --no-build-isolation "deepspeed"',
)


@pytest.fixture(scope="module")
def words(tiny_dir, tmp_path_factory):
    from fedfora.data.clinic import clinic_rows

    rows = tmp_path_factory.mktemp("rows") / "rows.json"
    rows.write_text("\n".join(map(json.dumps, clinic_rows()[:16])))
    return (
        f"train --model_name_or_path {tiny_dir} --quantization none --train_file {rows} --device "
        "cpu --lora_rank 2 --per_device_train_batch_size 2 --learning_rate 1e-2 --max_steps 4 "
        "--save_steps 2 --logging_steps 1 --report_to none"
    ).split()


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert main([*words, "--gradient_accumulation_steps", "2", "--output_dir", str(out)]) == 0
    return out


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def launch(command, words, out, *more):
    start = [sys.executable, *command.format(port=free_port()).split()]
    argv = [*start, *words, "--gradient_accumulation_steps", "1", "--output_dir", str(out), *more]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "2",  # so many devices DeepSpeed sees on a CPU
    }
    done = subprocess.run(argv, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(out):
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [(e["loss"], e["tokens"]) for e in lines if e["event"] == "step"]


def assert_same_training(out, alone, *, rtol=1e-4):
    assert [tokens for _, tokens in losses(out)] == [tokens for _, tokens in losses(alone)]
    assert [x for x, _ in losses(out)] == pytest.approx([x for x, _ in losses(alone)], rel=1e-5)
    expected = read_adapter(alone)
    for name, tensor in read_adapter(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=1e-5)


@pytest.fixture(scope="module")
def two(words, tmp_path_factory):
    """A function that returns the run of two processes under a launcher, and what it printed."""
    directory, ended = tmp_path_factory.mktemp("two"), {}

    def run(launcher):
        if launcher not in ended:
            done = launch(LAUNCHERS[launcher], words, directory / launcher)
            ended[launcher] = directory / launcher, done.stdout
        return ended[launcher]

    return run


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one_accumulating_twice(launcher, two, alone):
    out, printed = two(launcher)
    assert printed.count("adapter: ") == 1  # one process talks
    assert_same_training(out, alone)
    assert json.loads((out / "environment.json").read_text())["num_processes"] == 2


@pytest.mark.parametrize("launcher", ["torchrun", "fsdp"])
def test_two_processes_resume_as_they_would_have_gone_on(launcher, words, two, alone, tmp_path):
    before, out = read_adapter(two(launcher)[0]), tmp_path / "resumed"
    shutil.copytree(two(launcher)[0], out)
    shutil.rmtree(out / "checkpoint-4")
    launch(LAUNCHERS[launcher], words, out, "--resume_from_checkpoint", "last")
    after = read_adapter(out)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert_same_training(out, alone)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_and_resumes_as_one_process(stage, words, alone, tmp_path):
    """The adapter is checked against what was gathered after every save (AdapterTrainer)."""
    launcher = (
        "-m deepspeed.launcher.runner --include=localhost:0,1 --master_port {port} --module fedfora"
    )
    more = ["--deepspeed", str(CONFIGS / f"deepspeed_zero{stage}.json")]
    out = tmp_path / "two"
    launch(launcher, words, out, *more)
    assert_same_training(out, alone, rtol=1e-3)
    assert all(t.numel() > 0 for t in read_adapter(out / "checkpoint-2").values())
    before = read_adapter(out)
    shutil.rmtree(out / "checkpoint-4")
    launch(launcher, words, out, *more, "--resume_from_checkpoint", "last")
    after = read_adapter(out)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-7)
    assert [tokens for _, tokens in losses(out)] == [tokens for _, tokens in losses(alone)]


def test_a_lock_that_a_killed_build_left_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert stale_locks() == []  # a build may be going on
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    assert stale_locks() == [lock]
    monkeypatch.setattr("fedfora.training.preflight.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"fused_adam/lock is 60 minutes old.*Remove it"):
        check_deepspeed(str(CONFIGS / "deepspeed_zero2.json"))


def test_deepspeed_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"--deepspeed: no such file: none\.json"):
        check_deepspeed("none.json")
    monkeypatch.setattr("fedfora.training.preflight.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="DeepSpeed is not installed"):
        check_deepspeed(str(CONFIGS / "deepspeed_zero3.json"))
