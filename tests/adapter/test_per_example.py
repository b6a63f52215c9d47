"""Gradients of single examples against autograd on one example at a time."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedfora.adapter import ForaConfig
from fedfora.adapter.per_example import PerExampleGradients


@pytest.fixture
def ids():
    return torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))


def build(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)).double()
    config = ForaConfig(r=3, init_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(base, config, autocast_adapter_dtype=False).double().eval()


def losses(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return loss.view(len(ids), -1).mean(1)


def one_at_a_time(model, ids):
    found = []
    for row in ids:
        model.zero_grad()
        losses(model, row[None]).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"trainable": "core"},
        {"target_modules": ["q_proj", "v_proj"], "inner_dim": 4},
    ],
)
def test_gradients_of_a_batch_are_those_of_its_examples(options, ids):
    model = build(**options)
    expected = one_at_a_time(model, ids)
    with PerExampleGradients(model) as collector:
        losses(model, ids).sum().backward()
        found = collector.take()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(ids, use_reentrant):
    model = build()
    expected = one_at_a_time(model, ids)
    model.enable_input_require_grads()
    base = model.base_model.model
    enable = getattr(base, "activation_checkpointing_enable", None)  # its name from 5.23 on
    (enable or base.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
    model.train()
    with PerExampleGradients(model) as collector:
        losses(model, ids).sum().backward()
        found = collector.take()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_what_is_trained_beside_the_adapter_is_refused():
    model = build(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head.*is trained too"):
        PerExampleGradients(model)


def test_the_batchs_own_gradients_are_not_computed_and_all_is_as_before_afterwards(ids):
    model = build()
    trained = [p for p in model.parameters() if p.requires_grad]
    with PerExampleGradients(model) as collector:
        losses(model, ids).sum().backward()
        assert all(p.grad is None for p in trained)
    collector.take()
    with pytest.raises(IndexError), PerExampleGradients(model):
        losses(model, ids + 50)
    assert not model.get_input_embeddings()(ids).requires_grad
    losses(model, ids).sum().backward()
    assert all(p.grad is not None for p in trained)
    assert collector.take() == {}
