"""FoRA as a PEFT method: what PEFT's users do with any adapter."""

import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedfora import ForaConfig


@pytest.fixture
def base(tiny_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_dir).eval()


def adapted(base, **config):
    torch.manual_seed(1)
    model = get_peft_model(base, ForaConfig(r=2, task_type="CAUSAL_LM", **config)).eval()
    for name, p in model.named_parameters():
        if "fora_" in name:
            nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def test_all_linear_layers_but_the_head_are_adapted_by_default(base):
    names = adapted(base).targeted_module_names
    assert len(names) == 2 * 7
    assert not any("lm_head" in name for name in names)


def test_only_adapter_parameters_train(base):
    trained = [n for n, p in adapted(base).named_parameters() if p.requires_grad]
    assert trained
    assert all(".fora_" in name for name in trained)


def test_saved_and_loaded_is_bitwise_equal_in_a_fresh_process(base, ids, tiny_dir, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model, ids), tmp_path / "expected.pt")
    code = f"""
import torch; torch.set_num_threads(1)
import fedfora
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({tiny_dir!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(3))
with torch.no_grad():
    got = model(input_ids=ids).logits
assert torch.equal(got, torch.load({str(tmp_path / "expected.pt")!r})), "differs"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rank_and_alpha_patterns_reach_their_layers(base):
    model = adapted(base, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 7})
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.r["default"] == 5
    assert attention.k_proj.r["default"] == 2
    assert attention.v_proj.scaling["default"] == 7 / 2


def test_merge_and_unload_gives_a_plain_model_of_the_same_function(base, ids):
    model = adapted(base)
    expected = logits(model, ids)
    plain = model.merge_and_unload(safe_merge=True)
    assert not isinstance(plain, PeftModel)
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_are_switched_disabled_and_deleted(base, ids):
    model = adapted(base)
    first = logits(model, ids)
    model.add_adapter("second", ForaConfig(r=3, init_weights=False))
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    assert not torch.allclose(logits(model, ids), first)
    with model.disable_adapter():
        plain = logits(model, ids)
    with pytest.warns(UserWarning, match="second was active"):
        model.delete_adapter("second")
    assert not [n for n, _ in model.named_parameters() if "second" in n]
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    assert not torch.allclose(plain, first)


def test_each_row_of_a_batch_may_have_its_own_adapter(base, ids):
    model = adapted(base)
    model.add_adapter("second", ForaConfig(r=3, init_weights=False))
    model.eval()
    one = logits(model, ids)
    model.set_adapter("second")
    two = logits(model, ids)
    model.set_adapter("default")
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["second", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([two[0], one[1]]))
    with pytest.raises(ValueError, match="third"), torch.no_grad():
        model(input_ids=ids, adapter_names=["second", "third"])


def test_an_unsupported_layer_is_refused_and_named(base):
    with pytest.raises(ValueError, match="embed_tokens"):
        get_peft_model(base, ForaConfig(target_modules=["embed_tokens"]))


def test_fora_with_an_identity_core_is_lora(base, ids):
    """E = 0 and B = 0 make K the identity; then FoRA and PEFT's LoRA are the same function."""
    model = adapted(base, lora_alpha=8)
    for name, p in model.named_parameters():
        if "fora_E" in name or "fora_B" in name:
            nn.init.zeros_(p)
    factors = {n: p.detach().clone() for n, p in model.named_parameters() if "fora_" in n}
    expected = logits(model, ids)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(model.unload(), config).eval()
    for name, p in lora.named_parameters():
        if "lora_A" in name:
            p.data.copy_(factors[name.replace("lora_A", "fora_A")])
        elif "lora_B" in name:
            p.data.copy_(factors[name.replace("lora_B", "fora_D")])
    torch.testing.assert_close(logits(lora, ids), expected, rtol=1e-5, atol=1e-6)


def test_importing_fedfora_after_or_before_peft_registers_it():
    for order in ("import fedfora, peft", "import peft, fedfora"):
        code = f"{order}; from peft.utils.peft_types import PeftType; PeftType['FORA']"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
