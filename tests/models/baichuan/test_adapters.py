"""FoRA and LoRA on Baichuan: which layers, training on a quantized base, saving, merging."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from fedfora import ForaConfig

LAYERS = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUANTIZATIONS = {
    "none": None,
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
METHODS = {"fora": ForaConfig, "lora": LoraConfig}

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def load(checkpoint, quantization="none"):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=QUANTIZATIONS[quantization]
    )


def adapted(checkpoint, method, quantization="none", **config):
    torch.manual_seed(1)
    config = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"} | config
    return get_peft_model(load(checkpoint, quantization), METHODS[method](**config))


def adapted_layers(model):
    return {name.rsplit(".", 1)[1] for name in model.targeted_module_names}


@torch.no_grad()
def logits(model, ids, **inputs):
    return model.eval()(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("method", METHODS)
def test_without_targets_the_attention_is_adapted(checkpoint, method):
    model = adapted(checkpoint, method, target_modules=None)
    assert adapted_layers(model) == {"W_pack", "o_proj"}


def test_by_default_fora_adapts_every_linear_layer_but_the_output(checkpoint):
    assert adapted_layers(adapted(checkpoint, "fora")) == set(LAYERS)


def test_by_default_a_classifier_keeps_its_head_out_too(checkpoint):
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    model = get_peft_model(base, ForaConfig(r=2, task_type="SEQ_CLS"))
    assert {name for name in adapted_layers(model) if name != "score"} == set(LAYERS)
    assert not any("score" in name for name in model.targeted_module_names)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_is_the_same_after_saving_and_loading(
    checkpoint, method, quantization, ids, left, tmp_path
):
    model = adapted(checkpoint, method, quantization, target_modules=LAYERS)
    model.enable_input_require_grads()
    base = model.base_model.model
    (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)()
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-2)
    labels = ids.masked_fill(left == 0, -100)
    losses = []
    model.train()
    for _ in range(6):
        loss = model(input_ids=ids, attention_mask=left, labels=labels).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(checkpoint, quantization), tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_unmerged(checkpoint, method, ids):
    model = adapted(checkpoint, method, target_modules=LAYERS)
    for name, p in model.named_parameters():
        if "lora_" in name or "fora_" in name:
            nn.init.normal_(p, std=0.1)
    expected = logits(model, ids)
    with model.disable_adapter():
        assert (logits(model, ids) - expected).abs().max() > 1e-2
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)


def test_an_adapted_model_answers_padded_prompts(checkpoint, ids, left):
    model = adapted(checkpoint, "fora").eval()
    for name, p in model.named_parameters():
        if "fora_" in name:
            nn.init.normal_(p, std=0.1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = model.generate(input_ids=ids * left, attention_mask=left, **options)[:, 21:]
    for row, length in enumerate(left.sum(1).tolist()):
        alone = model.generate(input_ids=ids[row : row + 1, -length:], **options)[:, length:]
        assert torch.equal(alone[0], batch[row])
