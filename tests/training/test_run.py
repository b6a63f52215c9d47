"""`fedfora train` as a whole: the original's command, validation, kept rows, what cannot work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fedfora.cli.main import main
from fedfora.config import ConfigParser
from fedfora.models.saving import read_adapter
from fedfora.training.settings import SECTIONS, TrainSettings

# DESIGN section 5, word for word behind the program's name.
ORIGINAL = (
    "--train_file spo_0.json --model_name_or_path baichuan-inc/Baichuan2-7B-Chat --output_dir out "
    "--prompt_column input --response_column output --cache_dir cache --overwrite_cache "
    "--overwrite_output_dir --max_source_length 512 --max_target_length 512 --num_train_epochs 4 "
    "--gradient_accumulation_steps 4 --per_device_train_batch_size 1 --warmup_ratio 0.1 "
    "--lr_scheduler_type cosine --save_total_limit 1 --learning_rate 2e-5 --logging_steps 50 "
    "--save_steps 500 --lora_rank 2 --fp16 --torch_dtype float16 --preprocessing_num_workers 2 "
    "--deepspeed configs/deepspeed_zero2.json"
)


@pytest.fixture
def words(tiny_dir, tmp_path, rows_file):
    from fedfora.data.clinic import clinic_rows

    rows = rows_file([dict(row) for row in clinic_rows()[:12]])
    return (
        f"--model_name_or_path {tiny_dir} --quantization none --train_file {rows} --lora_rank 2 "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --learning_rate 1e-2 "
        f"--logging_steps 1 --report_to none --output_dir {tmp_path / 'out'}"
    ).split()


def events(out, name):
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def parse(words):
    return TrainSettings(*ConfigParser(SECTIONS.values()).parse(words.split()))


def test_a_short_training_records_its_curve(tmp_path):
    words = "--model_name_or_path clinic-base --quantization none --train_file clinic --lora_rank 2"
    more = f"--max_steps 4 --per_device_train_batch_size 1 --output_dir {tmp_path / 'out'}"
    assert main(["train", *words.split(), *more.split(), "--report_to", "none"]) == 0
    record = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in record if line["event"] == "step"] == [1, 2, 3, 4]


def test_the_originals_command_means_what_it_says():
    settings = parse(ORIGINAL)
    assert settings.run.overwrite_output_dir
    assert settings.data.train_file == "spo_0.json"
    assert settings.data.preprocessing_num_workers == 2
    assert (settings.model.cache_dir, settings.data.overwrite_cache) == ("cache", True)
    assert (settings.train.fp16, settings.model.torch_dtype) == (True, "float16")
    assert settings.checkpoint.save_total_limit == 1
    assert settings.launch.deepspeed == "configs/deepspeed_zero2.json"


def test_a_file_says_the_same_as_the_command_line(tmp_path):
    words = ORIGINAL.split()
    mapping, name = {}, ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            mapping[name] = True
        else:
            mapping[name] = yaml.safe_load(word) if word[0].isdigit() else word
    mapping["learning_rate"] = 2e-5  # YAML 1.1 reads 2e-5 as text
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(mapping))
    assert parse(f"--config {tmp_path / 'train.yaml'}") == parse(ORIGINAL)


def test_the_originals_command_runs(words, tmp_path, monkeypatch):
    """On a CPU: everything but half precision and DeepSpeed, which test_launchers.py runs."""
    monkeypatch.chdir(tmp_path)
    quick = ORIGINAL.replace("--fp16 --torch_dtype float16", "--bf16")
    quick = quick.split("--deepspeed")[0].replace("--num_train_epochs 4", "--num_train_epochs 0.5")
    assert main(["train", *quick.split(), *words]) == 0
    assert Path("out/adapter_model.safetensors").is_file()
    assert [p.name for p in Path("out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert len(list(Path("cache/encoded").iterdir())) == 1


def test_encoded_rows_are_kept_and_used_again(words, tmp_path, monkeypatch):
    import fedfora.data.encoding as cache

    encode, calls = cache.encode_and_count, []

    def count(*args, **kwargs):
        calls.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(cache, "encode_and_count", count)
    again = [*words, "--max_steps", "1", "--overwrite_output_dir"]
    cached = [*again, "--cache_dir", str(tmp_path / "cache")]
    adapters = []
    anew = [*cached, "--overwrite_cache"]
    for argv, encodings in ((again, 1), (cached, 2), (cached, 2), (anew, 3)):
        assert main(["train", *argv]) == 0
        assert len(calls) == encodings
        adapters.append(read_adapter(tmp_path / "out"))
    for adapter in adapters[1:]:
        assert all(torch.equal(adapter[n], t) for n, t in adapters[0].items())
    (kept,) = (tmp_path / "cache" / "encoded").iterdir()
    kept.write_bytes(b"broken")
    assert main(["train", *cached]) == 0  # a broken file is encoded anew
    assert len(calls) == 4


def test_validation_stops_early_and_keeps_the_best(words, tmp_path):
    """The loss on other rows soon hardly moves: two such looks end it, the best one is left."""
    out = tmp_path / "out"
    argv = [
        *words,
        *("--learning_rate", "0.3", "--max_steps", "30", "--lr_scheduler_type", "constant"),
        *("--validation_file", "clinic:test", "--eval_steps", "2", "--save_steps", "2"),
        *(
            "--early_stopping_patience",
            "2",
            "--early_stopping_threshold",
            "0.02",
            "--per_device_eval_batch_size",
            "120",
        ),
    ]
    assert main(["train", *argv]) == 0
    losses = {e["step"]: e["loss"] for e in events(out, "validation")}
    best = min(losses, key=losses.__getitem__)
    assert max(losses) < 30
    *before, last_but_one, last = losses.values()
    assert last_but_one > min(before) - 0.02
    assert last > min(*before, last_but_one) - 0.02
    kept, expected = read_adapter(out), read_adapter(out / f"checkpoint-{best}")
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())


def test_the_disk_is_looked_at_before_anything_is_written(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    )
    assert main(["train", *words]) == 2
    assert "--output_dir" in (error := capsys.readouterr().err)
    assert "the disk has 0 MiB left" in error
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_no_half_checkpoint(words, tmp_path, monkeypatch, capsys):
    original = torch.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        return original(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    assert main(["train", *words, "--max_steps", "6", "--save_steps", "2"]) == 2
    assert "checkpoint-4 cannot be written: [Errno 28]" in capsys.readouterr().err
    out = tmp_path / "out"
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / "adapter_model.safetensors").exists()


def test_a_directory_nothing_can_be_written_to_is_refused(words, capsys):
    assert main(["train", *words, "--output_dir", "/proc/fedfora"]) == 2
    assert "--output_dir /proc/fedfora cannot be written" in capsys.readouterr().err


def test_a_training_that_diverges_says_so_and_saves_nothing(words, tmp_path, capsys):
    argv = [*words, "--learning_rate", "1e6", "--max_steps", "4", "--warmup_ratio", "0"]
    assert main(["train", *argv]) == 2
    assert "the training has diverged" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("adapter_model.safetensors"))


def test_a_base_without_tokenizer_says_so(words, tiny_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_dir, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["train", *words, "--model_name_or_path", str(bare)]) == 2
    assert "bare: the model comes without a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "not json", '{"model_type": "no_such"}'])
def test_a_directory_that_is_no_model_says_so(words, tmp_path, capsys, content):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(content)
    assert main(["train", *words, "--model_name_or_path", str(tmp_path / "odd")]) == 2
    assert "odd: no model there" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "simulate"])
@pytest.mark.parametrize("role", ["train_file", "held out"])
def test_a_row_longer_than_the_context_is_named_before_any_work(
    command, role, tiny_dir, tmp_path, rows_file, capsys
):
    small = tmp_path / "small"
    shutil.copytree(tiny_dir, small)
    config = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": 40}
    (small / "config.json").write_text(json.dumps(config))
    short = {"instruction": "Extract:", "input": "x", "output": "y"}
    rows_file([short] * 3, "short.json")
    rows_file([short, {**short, "input": "note " * 60}], "long.json")
    held_out = {"train": "--validation_file", "simulate": "--test_file"}[command]
    files = ["long.json", "short.json"] if role == "train_file" else ["short.json", "long.json"]
    words = ["--model_name_or_path", str(small), "--quantization", "none"]
    words += ["--train_file", str(tmp_path / files[0]), held_out, str(tmp_path / files[1])]
    words += ["--num_clients", "2"] if command == "simulate" else ["--max_steps", "1"]
    words += ["--max_new_tokens", "4"] if command == "simulate" else []
    assert main([command, *words, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "long.json, row 2: " in error
    assert "context 40: lower --max_source_length" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--report_to tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        ("--early_stopping_patience 2", "--early_stopping_patience needs --validation_file"),
        ("--fp16", "--fp16 needs a GPU"),
        ("--save_steps 0", "--save_steps must be at least 1"),
        ("--deepspeed none.json", "--deepspeed: no such file: none.json"),
        ("--bnb_4bit_use_double_quant true", "needs --quantization nf4"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(words, tmp_path, capsys, flags, message):
    assert main(["train", *words, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()
