"""Base models: bundled, quantized, fingerprinted; adapters on them."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer

from fedfora.adapter.state import read_state
from fedfora.models.adapter_base import add_adapter, check_base
from fedfora.models.fingerprint import describe, fingerprint, same_model, sketch
from fedfora.models.loading import load_adapter, load_base
from fedfora.models.resolve import base_name_of, model_path, read_prompt_format
from fedfora.models.saving import adapter_config, adapter_record, save_adapter
from fedfora.models.settings import AdapterArguments, ModelArguments


def base_of(name, quantization="none"):
    return load_base(ModelArguments(model_name_or_path=name, quantization=quantization))


@pytest.fixture
def ids():
    return torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def test_the_bundled_base_is_a_llama_of_about_a_million_parameters():
    base = base_of("clinic-base")
    assert base.model.config.model_type == "llama"
    assert 0.9e6 < base.model.num_parameters() < 4e6
    assert base.tokenizer.decode(base.tokenizer("水温高 °C")["input_ids"]) == "水温高 °C"
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize(
    ("quantization", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")]
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes tells that it casts
def test_quantized_layers_are_bitsandbytes_own_and_near_the_float_model(
    quantization, layer, tiny_dir, ids
):
    plain, quantized = base_of(tiny_dir), base_of(tiny_dir, quantization)
    modules = dict(quantized.model.named_modules())
    assert type(modules["model.layers.0.mlp.up_proj"]).__name__ == layer
    assert type(modules["lm_head"]).__name__ == "Linear"
    one, two = logits(plain.model, ids), logits(quantized.model, ids)
    assert (one - two).norm() < 0.2 * one.norm()
    assert not torch.equal(one, two)


def test_nf4_on_the_cpu_gives_the_same_numbers_at_every_call(tiny_dir, ids):
    """With double quantization it would not (bitsandbytes on CPU); so there it is off."""
    base = base_of(tiny_dir, "nf4")
    first = logits(base.model, ids)
    assert all(torch.equal(first, logits(base.model, ids)) for _ in range(3))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_evaluating_in_between_does_not_change_gradients(quantization, tiny_dir, ids):
    """bitsandbytes repacks 4-bit weights when a CPU evaluates; then no gradient gets through."""
    model = add_adapter(base_of(tiny_dir, quantization), AdapterArguments(lora_rank=2), seed=1)
    for name, p in model.named_parameters():
        if "fora_D" in name:
            torch.nn.init.normal_(p, std=0.05)

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    training = logits(model, ids)
    evaluated = logits(model.eval(), ids)
    after = gradients()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if quantization == "nf4":  # int8 rounds its input in evaluation by another rule
        assert torch.equal(training, evaluated)


def test_nf4_with_an_adapter_saves_and_loads_to_the_bit(tiny_dir, ids, tmp_path):
    base = base_of(tiny_dir, "nf4")
    model = add_adapter(base, AdapterArguments(lora_rank=2), seed=1).eval()
    for name, p in model.named_parameters():
        if "fora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(tiny_dir, "nf4").model, tmp_path).eval()
    assert torch.equal(logits(again, ids), expected)


def test_an_adapter_on_an_nf4_base_merges(tiny_dir):
    """Merging quantizes again, so the merged weight is near the sum, not equal."""
    model = add_adapter(base_of(tiny_dir, "nf4"), AdapterArguments(lora_rank=2), seed=1).eval()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    torch.nn.init.normal_(layer.factor("D", "default").weight, std=0.05)
    expected = layer.get_base_weight() + layer.get_delta_weight("default")
    before = layer.get_base_weight().clone()
    layer.merge(safe_merge=True)
    merged = layer.get_base_weight()
    assert (merged - expected).norm() < 0.12 * expected.norm() < 0.5 * (before - expected).norm()


def test_the_fingerprint_is_that_of_weights_quantization_and_tokenizer(tiny_dir):
    one = fingerprint(base_of(tiny_dir))
    assert one == fingerprint(base_of(tiny_dir))
    assert one != fingerprint(base_of(tiny_dir, "nf4"))
    changed = base_of(tiny_dir)
    changed.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert one != fingerprint(changed)
    other_tokenizer = base_of(tiny_dir)
    other_tokenizer.tokenizer.chat_template = "{{ messages }}"
    assert one != fingerprint(other_tokenizer)
    turned, renamed, adapted = (base_of(tiny_dir) for _ in range(3))
    weight = turned.model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.reshape(weight.shape[::-1])
    norm = renamed.model.model.norm
    norm.scale = norm.weight
    del norm.weight
    assert len({one, fingerprint(turned), fingerprint(renamed)}) == 3
    add_adapter(adapted, AdapterArguments(lora_rank=2), seed=1)
    assert one == fingerprint(adapted)


def test_a_base_with_the_same_weights_and_another_function_has_another_fingerprint(
    tiny_dir, monkeypatch
):
    """With such a norm no adapter has a gradient: whoever hands out bases could blind all but one
    site (Pasquini et al. 2022), as the masks depend on the base's fingerprint."""
    one, blind = base_of(tiny_dir), base_of(tiny_dir)
    blind.model.config.rms_norm_eps = 1e30
    assert fingerprint(one) != fingerprint(blind)
    here, config = fingerprint(one), one.model.config
    config.use_cache, config.dtype = not config.use_cache, torch.bfloat16
    config.architectures, config.auto_map = ["Another"], {"AutoModel": "modeling.Another"}
    config.quantization_config = {"quant_method": "bitsandbytes"}
    monkeypatch.setattr("transformers.configuration_utils.__version__", "5.20.0")
    assert fingerprint(one) == here


@pytest.mark.parametrize("change", ["merges", "normalizer"])
def test_a_tokenizer_that_splits_text_otherwise_makes_another_base(tiny_dir, change):
    one, other = base_of(tiny_dir), base_of(tiny_dir)
    rules = json.loads(other.tokenizer.backend_tokenizer.to_str())
    if change == "merges":
        rules["model"]["merges"].reverse()
    else:
        rules["normalizer"] = {"type": "Lowercase"}
    other.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert fingerprint(one) != fingerprint(other)


def test_a_fingerprint_has_128_bits_and_one_of_64_by_an_earlier_fedfora_is_compared_by_the_sketch(
    tiny_dir, caplog
):
    """Of 64 bits, a party that makes two bases could have both alike after 2^32 trials."""
    base = base_of(tiny_dir)
    here = fingerprint(base)
    assert len(bytes.fromhex(here)) == 16
    record = {"base": describe(base)}
    for known in (here, "0123456789abcdef"):
        assert check_base(base, "adapter", {**record, "base_fingerprint": known}) == here
    assert not caplog.records
    with pytest.raises(ValueError, match="is not the base that adapter was trained on"):
        check_base(base, "adapter", {**record, "base_fingerprint": here[:16] + "0" * 16})
    record["base"]["sketch"] = record["base"]["sketch"].replace(".", ".9")
    with pytest.raises(ValueError, match="is not the base that adapter was trained on"):
        check_base(base, "adapter", {**record, "base_fingerprint": "0123456789abcdef"})


def test_rounding_leaves_a_sketch_that_of_the_same_model_and_a_hundredth_does_not(tiny_dir):
    base = base_of(tiny_dir)
    before, weight = sketch(base), base.model.get_input_embeddings().weight
    weight.data = weight.data.bfloat16().float()
    assert same_model(before, sketch(base))
    weight.data *= 1.01
    assert not same_model(before, sketch(base))


def test_the_same_seed_gives_the_same_adapter_whatever_was_drawn_before(tiny_dir):
    torch.manual_seed(1)
    one = read_state(add_adapter(base_of(tiny_dir), AdapterArguments(), seed=5))
    torch.rand(77)
    two = read_state(add_adapter(base_of(tiny_dir), AdapterArguments(), seed=5))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_drawing_an_adapter_leaves_the_global_random_state_alone(tiny_dir):
    base = base_of(tiny_dir)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    add_adapter(base, AdapterArguments(), seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_a_saved_adapter_knows_its_base_and_its_prompts(tiny_dir, tmp_path, ids):
    from fedfora.data.encoding import PromptFormat

    base = base_of(tiny_dir)
    model = add_adapter(base, AdapterArguments(lora_rank=2), seed=1)
    prompts = PromptFormat("plain", "Note: ", 100, 20)
    save_adapter(
        tmp_path, read_state(model), adapter_config(model), adapter_record(prompts, "f" * 16)
    )
    assert base_name_of(tmp_path) == tiny_dir
    assert read_prompt_format(tmp_path) == prompts
    assert torch.equal(
        logits(load_adapter(base_of(tiny_dir), tmp_path), ids), logits(model.eval(), ids)
    )


def private_bytes():
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def test_a_large_tensor_that_is_freed_goes_back_to_the_system(tiny_dir):
    """On glibc's heap it leaves a hole below what was allocated after it and is kept."""
    load_base(ModelArguments(model_name_or_path=tiny_dir, quantization="none"))
    torch.ones(7 * 2**20)  # freed at once: by itself glibc then puts up to 28 MiB on its heap
    before, kept = private_bytes(), []
    for _ in range(4):
        large = torch.ones(6 * 2**20)
        kept.append(torch.ones(2**18))
        del large
        kept.append(torch.ones(8 * 2**18))
    held = sum(tensor.numel() * 4 for tensor in kept)
    assert private_bytes() - before < held + 8 * 2**20


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match="--model_name_or_path nobody/nothing"):
        base_of("nobody/nothing")
    assert model_path("nobody/nothing") == "nobody/nothing"
