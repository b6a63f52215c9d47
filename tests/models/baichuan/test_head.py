"""Baichuan2's output rows are normalized once, while loading, or loading fails with the reason."""

import hashlib
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedfora.models.baichuan.modeling import BaichuanForCausalLM, normalize_rows


def load(checkpoint, **options):
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_length_one_in_the_dtype_they_are_loaded_in(checkpoint, dtype):
    raw = load_file(Path(checkpoint) / "model.safetensors")["lm_head.weight"].to(dtype)
    assert torch.equal(load(checkpoint, dtype=dtype).lm_head.weight, F.normalize(raw))


def test_the_checkpoint_on_the_disk_stays_as_it_is(checkpoint):
    file = Path(checkpoint) / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).digest()
    load(checkpoint)
    assert hashlib.sha256(file.read_bytes()).digest() == before


def test_a_first_generation_head_stays_as_it_is(publish, tmp_path):
    head = load(publish(tmp_path, "7b", norm_head=False)).lm_head.weight
    assert torch.equal(head, load_file(tmp_path / "model.safetensors")["lm_head.weight"])


def test_it_happens_once(checkpoint, tmp_path):
    """A trained head has rows of other lengths, which saving and loading must not lose."""
    model = load(checkpoint)
    model.lm_head.weight.data *= 2
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)


def test_it_happens_with_loading_info_too(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert model.config.norm_head is False
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_pickled_shards_load_like_safetensors(checkpoint, tmp_path):
    """Published files are .bin; torch reads them as plain tensors, never as Python objects."""
    weights = load_file(Path(checkpoint) / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(checkpoint) / "config.json").read_text())
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:7]}
    shards["pytorch_model-00002-of-00002.bin"] = names[7:]
    for file, held in shards.items():
        torch.save({name: weights[name] for name in held}, tmp_path / file)
    index = {name: file for file, held in shards.items() for name in held}
    total = sum(tensor.nbytes for tensor in weights.values())
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    expected, got = load(checkpoint).state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_the_angles_in_a_first_generation_checkpoint_are_ignored_without_a_word(
    publish, tmp_path, caplog
):
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    angles = {name: torch.ones(8) for name in names}
    load(publish(tmp_path, "7b", more_weights=angles))
    assert "inv_freq" not in caplog.text


def test_a_model_whose_head_is_still_raw_does_not_run(config_7b):
    model = BaichuanForCausalLM(config_7b).eval()
    ids = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match=r"call model.normalize_head\(\)"):
        model(ids)
    model.normalize_head()
    torch.testing.assert_close(model.lm_head.weight.norm(dim=1), torch.ones(96))
    assert model(ids).logits.shape == (1, 2, 96)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_head_is_refused(checkpoint_7b, kind):
    quantization = (
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["embed_tokens"])
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["embed_tokens"])
    )
    with pytest.raises(ValueError, match=r"quantized .*llm_int8_skip_modules=\['lm_head'\]"):
        load(checkpoint_7b, quantization_config=quantization)


def test_an_offloaded_head_is_refused(checkpoint_7b, tmp_path):
    with pytest.raises(ValueError, match=r"offloaded .*device_map"):
        load(
            checkpoint_7b,
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=str(tmp_path),
        )


def test_a_head_that_zero_3_has_partitioned_is_refused():
    """DeepSpeed leaves an empty weight and marks it so."""
    head = nn.Linear(4, 3, bias=False)
    head.weight.data = torch.empty(0)
    head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"ZeRO-3 .*ZeRO-2"):
        normalize_rows(head)


def test_an_adapter_on_the_head_keeps_its_own_weights(checkpoint_7b, tmp_path):
    """Loading an adapter directory loads the base below it, whose rows are normalized, not more."""
    config = peft.LoraConfig(
        target_modules=["o_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load(checkpoint_7b), config)
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    nn.init.normal_(trained, std=2)
    model.peft_config["default"].base_model_name_or_path = checkpoint_7b
    model.save_pretrained(tmp_path)
    head = load(str(tmp_path)).lm_head
    assert torch.equal(head.modules_to_save["default"].weight, trained)
    lengths = head.original_module.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(96))
