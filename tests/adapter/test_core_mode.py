"""Only the core trains: A and D stay, the adapter starts as a no-op and still learns."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedfora import ForaConfig
from fedfora.adapter import ForaLayer
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments


def core_config(**options):
    return ForaConfig(r=4, task_type="CAUSAL_LM", trainable="core", init_weights="svd", **options)


def ids():
    return torch.randint(0, 500, (4, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits


def train(model, steps=6):
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_starts_as_a_no_op_and_learns_in_the_core_alone(tiny_dir, quantization):
    arguments = ModelArguments(model_name_or_path=tiny_dir, quantization=quantization)
    base = load_base(arguments).model
    before = logits(base)
    model = get_peft_model(base, core_config())
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    outer = {n: p.clone() for n, p in model.named_parameters() if "fora_A" in n or "fora_D" in n}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in outer.items())
    assert all(p.norm() > 0 for p in outer.values())


def test_a_and_d_span_the_largest_directions_of_the_base_weight(tiny_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model = get_peft_model(base, core_config())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    weight = layer.get_base_layer().weight
    best = layer.factor("D", "default").weight @ layer.factor("A", "default").weight
    U, S, Vh = torch.linalg.svd(weight)
    torch.testing.assert_close(best, U[:, :4] @ torch.diag(S[:4]) @ Vh[:4], rtol=1e-4, atol=1e-5)


def test_a_trained_adapter_goes_on_with_its_core_alone(tiny_dir, tmp_path):
    """A and D from a given adapter: load it with trainable="core"; reset_core makes it a no-op."""
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    plain = logits(base)
    first = get_peft_model(base, ForaConfig(r=4, task_type="CAUSAL_LM"))
    train(first, steps=3)
    first.save_pretrained(tmp_path)
    config = ForaConfig.from_pretrained(tmp_path, trainable="core")
    config.trainable = "core"
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model = PeftModel.from_pretrained(base, tmp_path, config=config, is_trainable=True)
    torch.testing.assert_close(logits(model), logits(first))
    trained = {n.split(".fora_")[1][0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"B", "C", "E"}
    for layer in model.modules():
        if isinstance(layer, ForaLayer):
            layer.reset_core("default")
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-6)
    losses = train(model)
    assert losses[-1] < losses[0]


def test_a_rank_beyond_the_weights_own_is_padded_with_nothing(tiny_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    before = logits(base)
    config = ForaConfig(r=100, task_type="CAUSAL_LM", trainable="core", init_weights="svd")
    model = get_peft_model(base, config)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
