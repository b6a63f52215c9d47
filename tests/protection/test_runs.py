"""A machine with keys: what its runs leave on the disk, and what it will not load."""

import shutil

import pytest
import torch

from fedfora.adapter.state import fold
from fedfora.cli.main import main
from fedfora.data.clinic import clinic_rows
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import simulate
from fedfora.models.saving import read_adapter
from fedfora.protection import keys
from fedfora.reporting.view import View


@pytest.fixture
def federate(tiny_dir, tmp_path):
    def run(name, **flags):
        settings = from_run_config(
            {
                "model_name_or_path": tiny_dir,
                "quantization": "none",
                "train_file": "clinic",
                "output_dir": str(tmp_path / name),
                "lora_rank": 2,
                "num_clients": 2,
                "num_rounds": 2,
                "local_steps": 1,
                **flags,
            }
        )
        simulate(settings, View(1))
        return tmp_path / name

    return run


@pytest.fixture
def with_keys(tmp_path, monkeypatch):
    """Give this machine a signing key, trust in it, and an encryption key."""
    assert (
        main(f"keys --signing_key {tmp_path}/a.pem --encryption_key {tmp_path}/a.key".split()) == 0
    )

    def give():
        monkeypatch.setenv(keys.SIGNING, f"{tmp_path}/a.pem")
        monkeypatch.setenv(keys.TRUSTED, f"{tmp_path}/a.pem.pub")
        monkeypatch.setenv(keys.ENCRYPTION_FILE, f"{tmp_path}/a.key")

    return give


def logits_of(directory):
    from fedfora.models.adapter_base import logits
    from fedfora.models.loading import load_adapter, load_base
    from fedfora.models.resolve import base_name_of
    from fedfora.models.settings import ModelArguments

    model = ModelArguments(model_name_or_path=base_name_of(directory), quantization="none")
    return logits(load_adapter(load_base(model), directory))


def test_a_run_under_keys_is_the_same_run_sealed_and_signed(
    federate, with_keys, tmp_path, monkeypatch, capsys
):
    plain = federate("plain")
    expected, plain_logits = read_adapter(plain), logits_of(plain)
    with_keys()
    sealed = federate("sealed")
    assert not list(sealed.rglob("*.safetensors"))
    assert list(sealed.rglob("*.safetensors.sealed"))
    found = read_adapter(sealed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits_of(sealed), plain_logits)

    capsys.readouterr()
    assert main(["verify", "--model_dir", str(sealed / "round-002")]) == 0
    assert "trusted" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not signed"):
        read_adapter(plain)

    # Gone on with, under the same keys: whole; and with a changed checkpoint: not at all.
    before = fold(found)
    (sealed / "round-002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json is not the file that was signed"):
        federate("sealed", resume=str(sealed))
    assert all(torch.equal(fold(read_adapter(sealed))[name], before[name]) for name in before)

    keys.make_encryption_key(tmp_path / "other.key")
    monkeypatch.setenv(keys.ENCRYPTION_FILE, f"{tmp_path}/other.key")
    with pytest.raises(ValueError, match="another key"):
        logits_of(sealed)


def test_a_run_under_keys_is_gone_on_with(federate, with_keys):
    with_keys()
    whole = read_adapter(federate("whole"))
    sealed = federate("resumed")
    for path in (sealed / "round-002").iterdir():
        path.unlink()
    (sealed / "round-002").rmdir()
    resumed = read_adapter(federate("resumed", resume=str(sealed)))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_tampered_adapter_answers_nothing(federate, with_keys, capsys):
    with_keys()
    sealed = federate("sealed")
    config = sealed / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 400'))
    for command in (
        f"verify --model_dir {sealed}",
        f"predict --model_dir {sealed} --test_file clinic:test --output_dir {sealed}/p",
        f"export --model_dir {sealed} --output_dir {sealed}/e",
    ):
        assert main(command.split()) == 2, command
        assert "adapter_config.json is not the file that was signed" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_the_base_without_its_own_weights(tiny_dir, tmp_path, quantization):
    """A site that has only the export agrees on the fingerprint, and trains to the bit the same."""
    out = tmp_path / "quantized"
    common = f"--quantization {quantization} --model_name_or_path"
    assert (
        main(f"export --format quantized-base --output_dir {out} {common} {tiny_dir}".split()) == 0
    )
    train = "train --train_file clinic --max_steps 2 --lora_rank 2 --output_dir"
    assert main(f"{train} {tmp_path}/one {common} {tiny_dir}".split()) == 0
    assert main(f"{train} {tmp_path}/other {common} {out}".split()) == 0
    one, other = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_base_that_is_not_quantized_is_no_quantized_base(tiny_dir, tmp_path, capsys):
    words = f"export --format quantized-base --output_dir {tmp_path}/q --quantization none"
    assert main([*words.split(), "--model_name_or_path", tiny_dir]) == 2
    assert "needs --quantization" in capsys.readouterr().err


def test_a_training_under_keys_is_the_same_training_and_leaves_no_adapter_in_plain(
    tiny_dir, rows_file, tmp_path, with_keys
):
    """Stopped after step 2 and gone on with, the best step kept: to the bit as without keys."""
    rows = rows_file(clinic_rows()[:8])
    words = (
        f"train --model_name_or_path {tiny_dir} --quantization none --train_file {rows} "
        "--lora_rank 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
        f"--learning_rate 1e-2 --max_steps 4 --save_steps 2 --validation_file {rows} "
        "--load_best_model_at_end --output_dir"
    ).split()
    assert main([*words, str(tmp_path / "plain")]) == 0
    expected = read_adapter(tmp_path / "plain")
    with_keys()
    out = tmp_path / "sealed"
    assert main([*words, str(out)]) == 0
    shutil.rmtree(out / "checkpoint-4")
    assert main([*words, str(out), "--resume_from_checkpoint", str(out / "checkpoint-2")]) == 0
    found = read_adapter(out)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert not list(out.rglob("adapter_model.safetensors"))
    assert list(out.rglob("adapter_model.safetensors.sealed"))
