"""A run loses nobody's files: foreign ones stay, and all checks come before a deletion."""

import hashlib
import json

import pytest
import yaml

from fedfora.cli.main import main
from fedfora.reporting.record import check_output_dir


def snapshot(directory):
    """Every file below a directory, with a digest of its content."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def words(tiny_dir, rows_file, tmp_path):
    """A training of one step; the last word is its output directory."""
    rows = rows_file([{"instruction": "Extract:", "input": "x", "output": "a_b_c"}] * 4)
    return (
        f"--model_name_or_path {tiny_dir} --quantization none --train_file {rows} --lora_rank 2 "
        f"--report_to none --output_dir {tmp_path / 'out'}"
    ).split()


def put(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-500/adapter_model.safetensors",
        "checkpoint-1/optimizer.pt",
        "round-001/model.bin",
        "best/weights.bin",
        "sites/north/site.yaml",
        "config.json",
    ],
)
def test_what_fedfora_did_not_write_is_never_removed(tmp_path, words, name, overwrite, capsys):
    put(tmp_path / "out", name)
    before = snapshot(tmp_path)
    for command in (
        ["train", *words],
        ["simulate", *words[:-4], *words[-2:], "--num_clients", "2"],
    ):
        assert main([*command, *["--overwrite_output_dir"] * overwrite]) == 2
        assert f"--output_dir {tmp_path / 'out'} holds " in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md", "environment.json"])
def test_a_foreign_file_is_written_over_only_when_asked(tmp_path, name):
    put(tmp_path, name, "notes.txt", "src/checkpoint.py")
    with pytest.raises(ValueError, match=rf"holds {name}: name another .*--overwrite_output_dir"):
        check_output_dir(tmp_path, overwrite=False)
    check_output_dir(tmp_path, overwrite=True)
    (tmp_path / name).unlink()
    check_output_dir(tmp_path, overwrite=False)


def test_the_bases_own_directory_is_refused(words, tiny_dir, capsys):
    assert main(["train", *words[:-1], tiny_dir, "--overwrite_output_dir"]) == 2
    assert f"--output_dir {tiny_dir} holds a model (config.json)" in capsys.readouterr().err


MISTAKES = {
    "site privacy": "--privacy_unit site --noise_multiplier 1",
    "packing": "--privacy_unit record --noise_multiplier 1 --packing",
    "half precision": "--privacy_unit record --noise_multiplier 1 --fp16",
    "delta": "--privacy_unit record --noise_multiplier 1 --target_delta 0.5",
    "budget": "--privacy_unit record --noise_multiplier 0.1 --target_epsilon 0.01",
    "canary site": "--canaries 2 --canary_site 1",
    "fp16 on a CPU": "--fp16 --device cpu",
    "optimizer": "--optim paged_adamw_8bit --device cpu",
    "report": "--report_to nobody",
    "best": "--load_best_model_at_end --eval_steps 2 --save_steps 3 --validation_file {rows}",
    "targets": "--target_modules nowhere",
    "rank": "--lora_rank 0",
}


@pytest.mark.parametrize("flags", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_leaves_the_earlier_run_as_it_was(tmp_path, words, flags, capsys):
    out = tmp_path / "out"
    put(out, "config.yaml", "metrics.jsonl", "adapter_model.safetensors", "report.html")
    put(out, "checkpoint-1/progress.json", "checkpoint-1/optimizer.pt")
    before = snapshot(tmp_path)
    more = flags.format(rows=words[words.index("--train_file") + 1]).split()
    assert main(["train", *words, "--max_steps", "1", "--overwrite_output_dir", *more]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert snapshot(tmp_path) == before


SIMULATED = {
    "delta": "--privacy_unit record --noise_multiplier 1 --target_delta 0.5",
    "packing": "--privacy_unit record --noise_multiplier 1 --packing",
    "fp16 on a CPU": "--fp16 --device cpu",
    "optimizer": "--optim paged_adamw_8bit --device cpu",
    "budget": "--privacy_unit site --noise_multiplier 0.1 --target_epsilon 0.01",
    "rule": "--aggregation refactor --secure_aggregation",
    "targets": "--target_modules nowhere",
}


@pytest.mark.parametrize("flags", SIMULATED.values(), ids=SIMULATED)
def test_a_mistake_in_a_simulation_leaves_the_earlier_run(tmp_path, words, flags, capsys):
    out = tmp_path / "out"
    put(out, "config.yaml", "metrics.jsonl", "adapter_model.safetensors", "report.html")
    put(out, "round-001/state.json", "best/round.json", "sites/0/adapter/fedfora.json")
    before = snapshot(tmp_path)
    asked = [*words[:-4], *words[-2:], "--num_clients", "2", "--overwrite_output_dir"]
    assert main(["simulate", *asked, *flags.split()]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_several_processes_with_record_privacy_are_refused_at_once(words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    private = ["--privacy_unit", "record", "--noise_multiplier", "1"]
    assert main(["train", *words, *private]) == 2
    assert "--privacy_unit record trains in one process" in capsys.readouterr().err


def test_last_begins_a_run_that_was_killed_before_its_first_checkpoint(words, tmp_path, capsys):
    out, last = tmp_path / "out", ["--resume_from_checkpoint", "last", "--max_steps", "1"]
    assert main(["train", *words, *last]) == 0  # a job's first start says the same
    identity = json.loads((out / "checkpoint-1" / "progress.json").read_text())["identity"]
    for path in [*(out / "checkpoint-1").iterdir(), *out.glob("adapter_*")]:
        path.unlink()
    assert yaml.safe_load((out / "config.yaml").read_text())["adapter"]["lora_rank"] == 2
    assert main(["train", *words, *last, "--lora_rank", "3"]) == 2
    assert "lora_rank was 2, now it is 3" in capsys.readouterr().err
    assert main(["train", *words, *last]) == 0
    again = json.loads((out / "checkpoint-1" / "progress.json").read_text())["identity"]
    assert again == identity


def test_last_writes_over_no_finished_adapter_whose_checkpoints_are_gone(words, tmp_path, capsys):
    put(tmp_path / "out", "config.yaml", "metrics.jsonl", "adapter_config.json")
    before = snapshot(tmp_path)
    assert main(["train", *words, "--resume_from_checkpoint", "last"]) == 2
    assert "holds a finished adapter, but no checkpoint" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
