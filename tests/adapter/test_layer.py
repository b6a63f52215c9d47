"""The layer against its formula, written the slow way in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedfora.adapter import ForaConfig, ForaLinear
from fedfora.adapter.layer import folded_cores

FACTORS = "ABCDE"


def layer_of(I=8, O=12, randomize=True, **config):
    torch.manual_seed(0)
    config = ForaConfig(target_modules=["up"], **config)
    layer = ForaLinear(
        nn.Linear(I, O), "default", r=config.r, lora_alpha=config.lora_alpha, config=config
    )
    if randomize:
        for letter in FACTORS:
            nn.init.normal_(layer.factor(letter, "default").weight, std=0.3)
    return layer


def dense_update(layer):
    A, B, C, D, E = (layer.factor(letter, "default").weight.double() for letter in FACTORS)
    return layer.scaling["default"] * D @ (torch.eye(len(A)).double() + E + C @ B) @ A


@settings(deadline=None, max_examples=25)
@given(
    r=st.integers(1, 5),
    inner_dim=st.integers(1, 9),
    alpha=st.floats(0.1, 20),
    rslora=st.booleans(),
)
def test_forward_equals_the_dense_formula(r, inner_dim, alpha, rslora):
    layer = layer_of(r=r, inner_dim=inner_dim, lora_alpha=alpha, use_rslora=rslora).double()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    s = alpha / (r**0.5 if rslora else r)
    assert layer.scaling["default"] == pytest.approx(s)
    W = layer.base_layer.weight + dense_update(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.base_layer.bias))


def test_a_fresh_adapter_changes_nothing():
    layer, x = layer_of(randomize=False, r=2), torch.randn(4, 8)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_delta_weight_is_what_forward_adds():
    layer = layer_of(r=3)
    torch.testing.assert_close(
        layer.get_delta_weight("default").double(), dense_update(layer), rtol=1e-5, atol=1e-6
    )


def test_a_folded_core_is_the_same_function_and_leaves_no_trace():
    layer, x = layer_of(r=3).double(), torch.randn(4, 8, dtype=torch.float64)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    before, products = layer(x), []
    layer.factor("D", "default").register_forward_hook(lambda *_: products.append(1))
    with torch.no_grad(), folded_cores(layer, torch.float64):
        torch.testing.assert_close(layer(x), before)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.enable_adapters(True)
    assert products == []
    assert layer.state_dict().keys() == state.keys()
    nn.init.zeros_(layer.factor("D", "default").weight)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_merge_and_unmerge_keep_the_function():
    layer, x = layer_of(r=3), torch.randn(4, 8)
    before = layer(x)
    layer.merge(safe_merge=True)
    assert layer.merged
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


def test_dropout_is_applied_to_the_input_of_the_adapter_only():
    layer, x = layer_of(r=2, lora_dropout=0.5), torch.randn(400, 8)
    layer.train()
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    expected = layer.base_layer(x) + dropped @ dense_update(layer).float().mT
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_no_activation_of_inner_width_is_kept_for_the_backward_pass():
    """The point of folding: with M = 1,000, nothing of size tokens x M is saved."""
    layer, x = layer_of(r=2, inner_dim=1000), torch.randn(50, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert saved
    assert not [t.shape for t in saved if t.shape[0] == 50 and t.shape[-1] == 1000]


def test_a_token_costs_at_most_r_numbers_more_than_in_lora():
    """Bytes that autograd keeps, counted at two lengths so that what is kept once cancels."""
    from peft import LoraConfig, get_peft_model

    from fedfora import ForaConfig

    R, extra = 4, []
    for tokens in (50, 150):
        kept = {}
        for config in (LoraConfig, ForaConfig):
            torch.manual_seed(0)
            base = nn.ModuleDict({"up": nn.Linear(32, 48)})
            model = get_peft_model(base, config(r=R, target_modules=["up"])).train()
            layer, storages = model.base_model.model["up"], {}

            def keep(t, storages=storages):
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                out = layer(torch.randn(tokens, 32, requires_grad=True))
            del out
            kept[config] = sum(storages.values())
        extra.append(kept[ForaConfig] - kept[LoraConfig])
    assert (extra[1] - extra[0]) / 4 / 100 <= R


def test_the_core_stays_float32_under_autocast():
    """A core of bfloat16, identity plus something small, would lose what it learned."""
    layer = layer_of(r=2, randomize=False)
    nn.init.zeros_(layer.factor("E", "default").weight)
    layer.factor("E", "default").weight.data[0, 0] = 1e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        core = layer.core("default")
    assert core.dtype == torch.float32
    assert core[0, 0].item() == pytest.approx(1.0001)


def test_core_mode_trains_only_the_core():
    layer = layer_of(r=2, trainable="core")
    trained = {
        n.split(".")[0] for n, p in layer.named_parameters() if "fora" in n and p.requires_grad
    }
    assert trained == {"fora_B", "fora_C", "fora_E"}
