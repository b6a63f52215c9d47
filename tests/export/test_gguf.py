"""A GGUF adapter is the same function: tensor by tensor, and in llama.cpp where that is installed.

llama.cpp needs the base as GGUF too; its converter is no package, so a small one for these tests
stands here. It shares nothing with the exporter but the names of tensors.
"""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedfora import ForaConfig
from fedfora.cli.main import main
from fedfora.data.encoding import PromptFormat, encode_prompt
from fedfora.data.loading import Example
from fedfora.exporting.gguf import llama_cpp_logits, model_to_gguf, to_gguf
from fedfora.models.adapter_base import deviation, logits, probe
from fedfora.models.resolve import model_path
from fedfora.models.saving import adapter_record

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="needs llama.cpp: pip install llama-cpp-python"
)

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
CHAT = (
    "You help.\n{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}helper: "
)
ADAPTERS = {
    "plain": {"r": 3},
    "rslora": {"r": 4, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}},
}


def base_of(model_type, directory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **WIDTHS)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return model


def adapted(model, options, directory):
    torch.manual_seed(1)
    config = ForaConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options)
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "fora_" in name:
            nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return model


def write_base(model, path):
    """Write a Llama or Qwen as GGUF, without a tokenizer."""
    config = model.config
    arch = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
    kind = gguf.MODEL_ARCH[arch[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_value_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        part = name.split(".")[-2]
        if kind == gguf.MODEL_ARCH.LLAMA and part in ("q_proj", "k_proj"):
            pairs = np.arange(8)[:, None] + np.array([0, 8])  # row i beside row i + half
            heads = array.reshape(-1, 16, array.shape[1])
            array = heads[:, pairs.flatten()].reshape(array.shape)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_every_layer_adds_what_the_adapter_adds(options, tmp_path):
    model = adapted(base_of("qwen2", tmp_path / "base"), options, tmp_path / "fora")
    path = to_gguf(tmp_path / "fora", str(tmp_path / "base"), tmp_path / "out")
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    read = {t.name: torch.tensor(np.array(t.data)) for t in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    layers = [name for name, module in model.named_modules() if hasattr(module, "fora_A")]
    assert len(read) == 2 * len(layers)
    for layer in layers:
        name = names.get_name(layer.removeprefix("base_model.model."))
        A_RI, B_OR = read[f"{name}.weight.lora_a"], read[f"{name}.weight.lora_b"]
        expected = model.get_submodule(layer).get_delta_weight("default")
        torch.testing.assert_close(alpha / len(A_RI) * (B_OR @ A_RI), expected.detach())


@needs_llama_cpp
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_llama_cpp_computes_the_same_logits(model_type, options, tmp_path):
    base = base_of(model_type, tmp_path / "base")
    write_base(base, tmp_path / "base.gguf")
    ids = probe(WIDTHS["vocab_size"])
    plain = logits(base)
    assert deviation(plain, llama_cpp_logits(tmp_path / "base.gguf", None, ids)).largest < 1e-4
    model = adapted(base, options, tmp_path / "fora")
    path = to_gguf(tmp_path / "fora", str(tmp_path / "base"), tmp_path / "out")
    expected = logits(model)
    assert deviation(plain, expected).largest > 0.05  # the adapter does something
    result = deviation(expected, llama_cpp_logits(tmp_path / "base.gguf", path, ids))
    assert result.largest < 1e-4, result


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("gpt2", {"target_modules": ["c_attn"]}, "no such export for gpt2 models"),
        ("llama", {"modules_to_save": ["norm"]}, "cannot hold"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(model_type, options, message, tmp_path):
    widths = WIDTHS if model_type == "llama" else {"n_embd": 32, "n_layer": 1, "n_head": 2}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **widths))
    base.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], **options}
    model = get_peft_model(base, ForaConfig(task_type="CAUSAL_LM", r=2, **options))
    model.save_pretrained(tmp_path / "fora")
    with pytest.raises(ValueError, match=message):
        to_gguf(tmp_path / "fora", str(tmp_path / "base"), tmp_path / "out")


def with_tokenizer(model_type, directory, **widths):
    """A tiny base with the clinics' tokenizer and a chat template."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**WIDTHS, "vocab_size": 1600, **widths})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(model_path("clinic-base"))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    return model


def export_words(tmp_path, form):
    words = f"export --format {form} --model_dir {tmp_path}/fora --output_dir {tmp_path}/out "
    return (words + f"--model_name_or_path {tmp_path}/base --quantization none").split()


def test_the_command_writes_an_adapter_for_llama_cpp(tmp_path, capsys):
    adapted(with_tokenizer("llama", tmp_path / "base"), {"r": 2}, tmp_path / "fora")
    assert main(export_words(tmp_path, "gguf-lora")) == 0
    assert (tmp_path / "out" / "adapter.gguf").is_file()
    assert "read back, equal to the bit" in capsys.readouterr().out


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_command_writes_one_model_and_the_prompt_it_was_trained_with(template, tmp_path):
    """What Ollama makes of the Modelfile's template is what the model read in training."""
    model = adapted(with_tokenizer("llama", tmp_path / "base"), {"r": 2}, tmp_path / "fora")
    prompts = PromptFormat(template, "Please: ", 100, 20)
    record = adapter_record(prompts, "f00d")
    (tmp_path / "fora" / "fedfora.json").write_text(json.dumps(record))
    assert main(export_words(tmp_path, "gguf")) == 0
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./model.gguf" in text
    assert "ADAPTER" not in text
    asked = text.split('"""')[1].replace("{{ .Prompt }}", "Takes aspirin.")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    expected = encode_prompt(Example("", "Takes aspirin.", None, {}), tokenizer, prompts)
    assert tokenizer(asked).input_ids == expected
    written = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert written.get_field("tokenizer.chat_template").contents() == tokenizer.chat_template
    read = {t.name: torch.tensor(np.array(t.data)) for t in written.tensors}
    merged = model.merge_and_unload().state_dict()
    down = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(read["blk.1.ffn_down.weight"], merged[down])
    assert len(read) == len(merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_keeps_its_number_format(dtype, tmp_path):
    model = with_tokenizer("qwen3", tmp_path / "base", tie_word_embeddings=True)
    model.to(dtype).save_pretrained(tmp_path / "base")
    read = gguf.GGUFReader(model_to_gguf(tmp_path / "base", tmp_path / "out"))
    kinds = {t.name: t.tensor_type.name for t in read.tensors}
    assert kinds["token_embd.weight"] == {2: "F16", 4: "F32"}.get(dtype.itemsize, "") or (
        dtype == torch.bfloat16 and kinds["token_embd.weight"] == "BF16"
    )
    assert kinds["output_norm.weight"] == "F32"
    assert "output.weight" not in kinds  # tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no export for this kind of tokenizer"),
        ({"rope": "yarn"}, "no export for position scaling 'yarn'"),
    ],
)
def test_what_cannot_be_written_faithfully_is_refused(change, message, tmp_path):
    with_tokenizer("llama", tmp_path / "base")
    name = "config.json" if "rope" in change else "tokenizer.json"
    path = tmp_path / "base" / name
    content = json.loads(path.read_text())
    if "rope" in change:
        content["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0}
    path.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        model_to_gguf(tmp_path / "base", tmp_path / "out")


@needs_llama_cpp
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_computes_the_logits_of_the_whole_model(model_type, tmp_path):
    model = with_tokenizer(model_type, tmp_path / "base")
    path = model_to_gguf(tmp_path / "base", tmp_path / "out")
    result = deviation(logits(model), llama_cpp_logits(path, None, probe(1600)))
    assert result.largest < 1e-4, result


def test_without_the_package_the_command_that_installs_it_is_named(tmp_path, monkeypatch, capsys):
    adapted(base_of("llama", tmp_path / "base"), {"r": 2}, tmp_path / "fora")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    words = f"export --format gguf --model_dir {tmp_path}/fora --output_dir {tmp_path}/out "
    words += f"--model_name_or_path {tmp_path}/base"
    assert main(words.split()) == 2
    assert 'pip install "fedfora[gguf]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
