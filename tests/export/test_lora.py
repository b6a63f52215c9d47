"""A FoRA adapter is a LoRA adapter: out, back, and through plain PEFT without fedfora."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fedfora import ForaConfig
from fedfora.cli.main import main
from fedfora.exporting.lora import from_lora, to_lora
from fedfora.models.adapter_base import deviation, logits


def base_of(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def adapted(base, config=None):
    torch.manual_seed(1)
    model = get_peft_model(base, config or ForaConfig(r=3, task_type="CAUSAL_LM")).eval()
    for name, p in model.named_parameters():
        if "fora_" in name or "lora_" in name:
            nn.init.normal_(p, std=0.1)
    return model


def assert_same(one, two):
    assert deviation(logits(one), logits(two)).largest < 1e-6


@pytest.mark.parametrize(
    "config",
    [
        {"r": 3},
        {"r": 2, "lora_alpha": 5, "use_rslora": True},
        {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}},
        {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save"],
)
def test_a_saved_adapter_becomes_lora_of_the_same_function(config, tiny_dir, tmp_path):
    model = adapted(base_of(tiny_dir), ForaConfig(task_type="CAUSAL_LM", **config))
    model.save_pretrained(tmp_path / "fora")
    to_lora(tmp_path / "fora", tmp_path / "lora")
    lora = PeftModel.from_pretrained(base_of(tiny_dir), tmp_path / "lora")
    assert lora.peft_config["default"].peft_type == "LORA"
    assert_same(lora, model)


def test_a_model_in_memory_gives_the_same_files_as_its_directory(tiny_dir, tmp_path):
    from safetensors.torch import load_file

    model = adapted(base_of(tiny_dir))
    model.save_pretrained(tmp_path / "fora")
    to_lora(model, tmp_path / "a")
    to_lora(tmp_path / "fora", tmp_path / "b")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_gpt2_with_its_transposed_layers_goes_the_same_way(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=100, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = adapted(base_of(tmp_path / "base"))
    to_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(base_of(tmp_path / "base"), tmp_path / "lora")
    assert_same(lora, model)
    before = logits(model)
    model.merge_adapter()
    assert deviation(before, logits(model)).largest < 1e-5


def test_plain_peft_loads_the_export_without_fedfora(tiny_dir, tmp_path):
    model = adapted(base_of(tiny_dir))
    to_lora(model, tmp_path / "lora")
    torch.save(logits(model), tmp_path / "expected.pt")
    code = f"""
import sys; sys.modules["fedfora"] = None  # any import of it fails
import torch; torch.set_num_threads(1)
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "lora")!r}).eval()
ids = torch.randint(0, model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    got = model(input_ids=ids).logits
expected = torch.load({str(tmp_path / "expected.pt")!r})
assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_any_lora_is_a_fora_and_comes_back_to_the_bit(tiny_dir, tmp_path):
    from safetensors.torch import load_file

    config = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = adapted(base_of(tiny_dir), config)
    lora.save_pretrained(tmp_path / "lora")
    from_lora(tmp_path / "lora", tmp_path / "fora")
    fora = PeftModel.from_pretrained(base_of(tiny_dir), tmp_path / "fora")
    assert fora.peft_config["default"].peft_type == "FORA"
    assert_same(fora, lora)
    to_lora(tmp_path / "fora", tmp_path / "back")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("lora", "back"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_not_fora_or_not_plain_lora_is_refused(tiny_dir, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(base_of(tiny_dir), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        from_lora(tmp_path / "dora", tmp_path / "x")
    with pytest.raises(ValueError, match="dora: expected a FORA adapter, this one is LORA"):
        to_lora(tmp_path / "dora", tmp_path / "x")
    with pytest.raises(ValueError, match=r"adapter .*: the directory holds no adapter_config.json"):
        to_lora(tmp_path, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture
def trained(tiny_dir, tmp_path):
    """An adapter with a visible update on an NF4 base, as a run directory."""
    from fedfora.models.loading import load_base
    from fedfora.models.settings import ModelArguments

    base = load_base(ModelArguments(model_name_or_path=tiny_dir, quantization="nf4"))
    config = ForaConfig(r=2, task_type="CAUSAL_LM", base_model_name_or_path=tiny_dir)
    torch.manual_seed(1)
    model = get_peft_model(base.model, config)
    for name, p in model.named_parameters():
        if "fora_D" in name:
            nn.init.normal_(p, std=0.02)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_export_lora_checks_what_it_wrote(trained, tmp_path, capsys):
    out = tmp_path / "lora"
    assert main(f"export --model_dir {trained} --output_dir {out}".split()) == 0
    assert "LoRA against FoRA on the same base: largest deviation" in capsys.readouterr().out
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_export_merged_says_how_far_both_bases_are(trained, tmp_path, capsys):
    for into in ("dequantized", "original"):
        out = tmp_path / into
        words = f"export --model_dir {trained} --format merged --merge_into {into}"
        assert main([*words.split(), "--output_dir", str(out)]) == 0
        said = capsys.readouterr().out
        assert f"merged into the {into} base" in said
        model = AutoModelForCausalLM.from_pretrained(out)
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    near, far = (
        float(next(line for line in said.split("\n") if word in line).split()[-5].rstrip(","))
        for word in ("would give", "merged into")
    )
    assert near < 0.01 < far


def test_a_failed_check_leaves_nothing_behind(trained, tmp_path, monkeypatch, capsys):
    from fedfora.exporting import run

    monkeypatch.setattr(run, "EXACT", -1.0)
    out = tmp_path / "lora"
    assert main(f"export --model_dir {trained} --output_dir {out}".split()) == 2
    assert "not the same function" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trained"]


def test_a_full_output_directory_is_refused(trained, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    assert main(f"export --model_dir {trained} --output_dir {tmp_path / 'full'}".split()) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert (tmp_path / "full" / "precious.txt").exists()


def test_an_export_takes_the_place_of_an_export_only(trained, tmp_path, monkeypatch, capsys):
    """Its own files go; the adapter's run, anything beside them, and what a link hides stay."""

    def run(output, *more):
        words = ["export", "--model_dir", str(trained), "--output_dir", str(output), *more]
        return main([*words, "--quantization", "none"]), capsys.readouterr().err

    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    again = "--overwrite_output_dir"
    for own in (trained, trained / "."):
        status, error = run(own, again)
        assert status == 2
        assert "is where" in error
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before

    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run(tmp_path / "link") == (0, "")
    written = sorted(path.name for path in (tmp_path / "real").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(written)
    monkeypatch.chdir(tmp_path / "real")
    assert run(".")[0] == 2
    assert run(".", again) == (0, "")
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == written
    (tmp_path / "real" / "notes.txt").write_text("precious")
    status, error = run(".", again)
    assert status == 2
    assert "holds notes.txt, which no export wrote" in error
    assert (tmp_path / "real" / "notes.txt").read_text() == "precious"
