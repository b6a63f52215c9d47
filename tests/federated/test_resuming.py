"""Killed and resumed is uninterrupted: the same adapters to the bit, and the same record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedfora.config import ConfigError
from fedfora.federated.coordinator import checkpoint, rounds
from fedfora.federated.preflight import resolve_settings
from fedfora.federated.settings import settings_parser
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.federated.site_runtime import release
from fedfora.models import saving
from fedfora.reporting.view import View

CLOCKS = {"seconds", "time"}


def assert_same_run(one, other):
    """Adapters, best rounds and checkpoints to the bit; records but for the clock."""
    for place in ("", "best", *sorted(p.name for p in Path(one).glob("round-*"))):
        left, right = (
            load_file(Path(run, place, "adapter_model.safetensors")) for run in (one, other)
        )
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert timeless(read_rounds(one)) == timeless(read_rounds(other))
    assert sorted(p.name for p in Path(one).iterdir()) == sorted(
        p.name for p in Path(other).iterdir()
    )


def timeless(value):
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in CLOCKS}
    return value


def resumed(directory, *words):
    parser = settings_parser()
    return resolve_settings(parser.values(["--resume", str(directory), *words]), parser)


def killed_runs(tiny_dir, few_rows, tmp_path, *, seed, points, timers, quantization="none"):
    """Everything that is kept takes part: sites' error feedback, the server's moments, the best."""
    settings = {
        "model_name_or_path": tiny_dir,
        "quantization": quantization,
        "train_file": few_rows,
        "partition": "iid",
        "num_clients": 3,
        "clients_per_round": 2,
        "lora_rank": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_rounds": 4,
        "local_steps": 1,
        "validation_fraction": 0.2,
        "server_optimizer": "adam",
        "server_learning_rate": 0.1,
        "update_dtype": "int8",
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    worker = Path(__file__).with_name("killed_runs.py")
    words = [tmp_path / "settings.json", tmp_path / "out", seed, points, timers]
    done = subprocess.run(
        [sys.executable, worker, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives of the run are forked processes")
def test_killed_at_random_points_and_resumed_is_uninterrupted(tiny_dir, few_rows, tmp_path):
    told = killed_runs(tiny_dir, few_rows, tmp_path, seed=0, points=8, timers=12)
    assert told["deaths"] >= 9
    whole, *others = told["runs"]
    for other in others:
        assert_same_run(whole, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives of the run are forked processes")
def test_on_a_base_in_4_bits_resumed_is_uninterrupted_too(tiny_dir, few_rows, tmp_path):
    told = killed_runs(tiny_dir, few_rows, tmp_path, seed=2, points=3, timers=3, quantization="nf4")
    assert told["deaths"] >= 3
    whole, *others = told["runs"]
    for other in others:
        assert_same_run(whole, other)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives of the run are forked processes")
def test_killed_at_every_single_change_to_its_files(tiny_dir, few_rows, tmp_path):
    told = killed_runs(tiny_dir, few_rows, tmp_path, seed=1, points=10_000, timers=60)
    assert told["deaths"] >= told["changes"]
    whole, *others = told["runs"]
    for other in others:
        assert_same_run(whole, other)


def _no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _half_written(path, *args, **kwargs):
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (checkpoint, "save_tensors", _half_written),
        (checkpoint, "_to_disk", _no_space),
        (rounds, "publish_best", _no_space),
        (saving, "save_tensors", _half_written),
        (saving, "write_json", _no_space),
    ],
)
def test_a_full_disk_stops_the_run_and_loses_nothing(
    settings, tmp_path, monkeypatch, module, name, broken
):
    flags = {"num_rounds": 4, "validation_fraction": 0.2}
    simulate(settings(**flags, output_dir=str(tmp_path / "whole")), View(1))

    calls = {"n": 0}
    original = getattr(module, name)

    def fails_later(*args, **kwargs):
        calls["n"] += 1
        return (broken if calls["n"] > 2 else original)(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails_later)
        with pytest.raises(ValueError, match=r"cannot be written: .*No space left.*--resume"):
            simulate(settings(**flags), View(1))
    kept = checkpoint.load_checkpoint(tmp_path / "out")
    assert kept is None or all(torch.isfinite(v).all() for v in kept.adapter.values())
    simulate(resumed(tmp_path / "out"), View(1))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(settings, tmp_path):
    simulate(settings(validation_fraction=0.2), View(1))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    simulate(resumed(tmp_path / "out"), View(1))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}


def test_a_run_that_stopped_for_want_of_a_quorum_goes_on(
    settings, misbehave, tmp_path, monkeypatch
):
    def fail(honest, message, context):
        raise RuntimeError("network down")

    simulate(settings(num_rounds=3, min_clients=4, output_dir=str(tmp_path / "whole")), View(1))
    misbehave(fail, from_round=3)
    with pytest.raises(ValueError, match="round 3"):
        simulate(settings(num_rounds=3, min_clients=4), View(1))
    monkeypatch.undo()
    lines = simulate(resumed(tmp_path / "out"), View(1))
    assert timeless(lines) == timeless(read_rounds(tmp_path / "whole"))


def test_settings_come_from_the_run_and_none_may_change(settings, tmp_path):
    chosen = settings(num_rounds=1, learning_rate=1e-3)
    simulate(chosen, View(1))
    out = tmp_path / "out"
    again = resumed(out)
    assert again.train == chosen.train
    assert again.federation == chosen.federation
    assert resumed(out, "--learning_rate", "0.001").train == chosen.train  # not a change
    with pytest.raises(ConfigError, match=r"the run began with --learning_rate 0.001, not 0.1"):
        resumed(out, "--learning_rate", "0.1")
    with pytest.raises(ConfigError, match="--num_rounds 1, not 5"):
        resumed(out, "--num_rounds", "5")


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        resumed(tmp_path)


def test_a_run_may_be_moved(settings, tmp_path):
    simulate(settings(num_rounds=1), View(1))
    (tmp_path / "out").rename(tmp_path / "moved")
    assert resumed(tmp_path / "moved").run.output_dir == str(tmp_path / "moved")
    simulate(resumed(tmp_path / "moved"), View(1))


def test_other_rows_or_another_base_are_refused(settings, tmp_path, few_rows):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Path(few_rows).read_text())
    simulate(settings(train_file=str(rows), num_rounds=1), View(1))
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:-1], lines[0]]) + "\n")
    with pytest.raises(ValueError, match=r"the rows of .* have changed"):
        simulate(resumed(tmp_path / "out"), View(1))
    release()  # else this process would not read them again
    other = json.loads(lines[-1])
    rows.write_text("\n".join([*lines[:-1], json.dumps(other | {"output": "another"})]) + "\n")
    with pytest.raises(ValueError, match=r"the rows of .* have changed"):
        simulate(resumed(tmp_path / "out"), View(1))
    release()
    rows.write_text("\n".join(lines) + "\n")
    environment = tmp_path / "out" / "environment.json"
    known = json.loads(environment.read_text())
    environment.write_text(json.dumps(known | {"base_fingerprint": "feed"}))
    with pytest.raises(ValueError, match="the run began on base model feed"):
        simulate(resumed(tmp_path / "out"), View(1))


def test_overwriting_leaves_nothing_of_the_earlier_run_to_resume(settings, tmp_path):
    simulate(settings(num_rounds=3, validation_fraction=0.2), View(1))
    simulate(settings(num_rounds=1, overwrite_output_dir=True), View(1))
    assert [p.name for p in (tmp_path / "out").glob("round-*")] == ["round-001"]
    assert not (tmp_path / "out" / "best").exists()
