"""A GGUF file as base: the same function as the checkpoint that it was written from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedfora.cli.main import main
from fedfora.exporting.gguf import model_to_gguf
from fedfora.models.fingerprint import fingerprint
from fedfora.models.loading import load_base
from fedfora.models.resolve import _IN_GGUF, check_model_name
from fedfora.models.settings import ModelArguments

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def gguf_file(tiny_dir, tmp_path_factory):
    return model_to_gguf(Path(tiny_dir), tmp_path_factory.mktemp("gguf-base"))


def base_of(name, quantization="none", **settings):
    return load_base(
        ModelArguments(model_name_or_path=str(name), quantization=quantization, **settings)
    )


@torch.no_grad()
def logits(base):
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(3))
    return base.model(input_ids=ids).logits


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_it_computes_what_the_checkpoint_computes(tiny_dir, gguf_file, quantization):
    ours, theirs = base_of(gguf_file, quantization), base_of(tiny_dir, quantization)
    assert torch.equal(logits(ours), logits(theirs))
    text = "Patient: 水温高 °C, [bladder]\n  twice_daily"
    assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
    assert ours.tokenizer.eos_token_id == theirs.tokenizer.eos_token_id
    assert fingerprint(ours) == fingerprint(base_of(gguf_file.parent, quantization))


def test_an_adapter_on_it_trains_predicts_and_exports(gguf_file, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Say", "input": "a", "output": "b"}] * 4))
    adapter, base = str(tmp_path / "adapter"), ["--device", "cpu", "--quantization", "none"]
    named = ["--model_name_or_path", str(gguf_file), *base]
    steps = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "0.1"]
    data = ["--train_file", str(rows), "--output_dir", adapter]
    command = [sys.executable, "-m", "fedfora", "train", *named, *data, *steps]
    trained = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "GGUF" not in trained.stderr  # transformers' own bar over its tensors
    answers = ["--test_file", str(rows), "--output_dir", str(tmp_path / "answers")]
    assert main(["predict", *base, "--model_dir", adapter, *answers, "--max_new_tokens", "2"]) == 0
    for form in ("lora", "merged"):
        target = ["--output_dir", str(tmp_path / form), "--format", form]
        assert main(["export", *base, "--model_dir", adapter, *target]) == 0
    assert not torch.equal(logits(base_of(tmp_path / "merged")), logits(base_of(gguf_file)))
    capsys.readouterr()


def test_a_directory_with_two_or_none_and_a_file_of_another_kind_are_refused(gguf_file, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf_file, tmp_path / name)
    with pytest.raises(ValueError, match=r"more than one GGUF; name one: a\.gguf, b\.gguf"):
        check_model_name(str(tmp_path))
    (tmp_path / "c.gguf").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"c\.gguf: not a GGUF file"):
        check_model_name(str(tmp_path / "c.gguf"))
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match=r"rows\.json: that is a file, but not"):
        check_model_name(str(tmp_path / "rows.json"))
    with pytest.raises(ValueError, match="no model there"):
        check_model_name(str(tmp_path / "missing.gguf"))


def test_a_missing_package_is_named(gguf_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'pip install "fedfora\[gguf\]"'):
        check_model_name(str(gguf_file))


def test_no_family_is_refused_that_transformers_reads():
    """But encoders with decoders; a file writes qwen2moe, transformers qwen2_moe."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    read = {name.replace("_", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
    known = {name.replace("-", "") for name in _IN_GGUF.split()}
    assert read - {"general", "tokenizer", "t5", "umt5"} <= known


def test_an_unknown_architecture_is_one_clear_line(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "strangeformer")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"strange\.gguf: .*strangeformer") as error:
        base_of(tmp_path / "strange.gguf")
    assert "\n" not in str(error.value)
