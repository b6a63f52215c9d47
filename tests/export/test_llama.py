"""A Baichuan-7B becomes a Llama of the same function, loaded without fedfora."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fedfora import ForaConfig
from fedfora.exporting.llama import export_llama
from fedfora.exporting.run import export
from fedfora.exporting.settings import ExportArguments, ExportSettings
from fedfora.models.baichuan.configuration import BaichuanConfig
from fedfora.models.baichuan.modeling import BaichuanForCausalLM
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments

ON_CPU = ModelArguments(quantization="none", device="cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture
def make_source(tmp_path):
    """A function that writes a random Baichuan as it is published and returns its directory."""

    def make(dtype=torch.float32, **changes):
        fields = SIZES | {"vocab_size": 640, "num_attention_heads": 4, "norm_head": True} | changes
        torch.manual_seed(0)
        model = BaichuanForCausalLM(BaichuanConfig(**fields)).to(dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
        model.generation_config.update(do_sample=True, top_k=5, repetition_penalty=1.05)
        model.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


@pytest.fixture
def source(make_source):
    return make_source(max_position_embeddings=128)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "llama"


def test_the_logits_are_the_same(source, target):
    deviation = export_llama(source, target)
    ids = torch.randint(640, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        got = AutoModelForCausalLM.from_pretrained(target)(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert deviation < 1e-4


def test_weights_keep_their_number_format_and_are_still_checked_in_float32(make_source, target):
    deviation = export_llama(make_source(torch.bfloat16, max_position_embeddings=128), target)
    written = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert "model.layers.1.self_attn.v_proj.weight" in written
    assert deviation < 1e-4


def test_generation_defaults_come_along(source, target):
    export_llama(source, target)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.model_type == "llama"
    assert (model.generation_config.top_k, model.generation_config.repetition_penalty) == (5, 1.05)


def test_a_damaged_result_is_noticed(source, target, monkeypatch):
    from transformers import LlamaForCausalLM

    def save_damaged(model, directory):
        directory.mkdir()
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        weights["model.layers.1.self_attn.k_proj.weight"] *= 1.5
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(directory)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_damaged)
    with pytest.raises(ValueError, match=r"logits .* differ .* do not use it"):
        export_llama(source, target)


def test_alibi_has_no_llama_form(make_source, target):
    source = make_source(position_embedding="alibi")
    with pytest.raises(ValueError, match=r"ALiBi .*only the 7B models"):
        export_llama(source, target)
    assert not target.exists()


def test_what_cannot_be_exported_is_named(source, target, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="is a llama model, not a Baichuan"):
        export_llama(tiny_dir, target)
    with pytest.raises(ValueError, match=r"nowhere: the directory holds no config.json"):
        export_llama(tmp_path / "nowhere", target)
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        export_llama(source, source)


@pytest.mark.parametrize("generation", ["baichuan", "baichuan2"])
def test_the_tokenizer_works_without_fedfora(source, target, publish_tokenizer, generation):
    publish_tokenizer(source, generation)
    export_llama(source, target)
    text = "水温高  a 12 <x>\n😀"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "你好"}]
    native = AutoTokenizer.from_pretrained(source)
    expected = native(text)["input_ids"], native.apply_chat_template(messages)["input_ids"]
    code = f"""
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(target)!r})
assert not [name for name in sys.modules if name.startswith("fedfora")]
ids = tokenizer({text!r})["input_ids"]
print([ids, tokenizer.apply_chat_template({messages!r})["input_ids"]])
assert tokenizer.decode(ids) == {text!r}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(list(expected))


def test_a_tokenizer_that_would_give_other_ids_is_not_written(
    source, target, publish_tokenizer, monkeypatch, caplog
):
    from fedfora.exporting import llama

    publish_tokenizer(source, "baichuan2")
    monkeypatch.setattr(llama, "SPACE", "_")
    export_llama(source, target)
    assert "no tokenizer.json: it would encode" in caplog.text
    assert (target / "tokenizer.model").is_file()
    assert not (target / "tokenizer.json").exists()


def run_export(**arguments):
    return export(ExportSettings(frozenset(), ExportArguments(format="llama", **arguments), ON_CPU))


def test_the_command_takes_a_model_or_an_adapter_on_one(source, publish_tokenizer, tmp_path):
    publish_tokenizer(source, "baichuan2")
    base = load_base(replace(ON_CPU, model_name_or_path=str(source)))
    model = get_peft_model(base.model, ForaConfig(r=2, target_modules="all-linear")).eval()
    ids = torch.randint(640, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        expected = {"adapter": model(ids).logits}
        with model.disable_adapter():
            expected["source"] = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    for name, logits in expected.items():
        output = tmp_path / f"llama-of-{name}"
        lines = run_export(model_dir=str(tmp_path / name), output_dir=str(output))
        assert "Llama against Baichuan" in lines[-1]
        llama = LlamaForCausalLM.from_pretrained(output).eval()
        with torch.no_grad():
            torch.testing.assert_close(llama(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_what_is_neither_a_model_nor_an_adapter_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        run_export(model_dir=str(tmp_path), output_dir=str(tmp_path / "no"))
