"""Positions are kept in full precision and at little cost; what would lose them is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM


def load(checkpoint, **options):
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


def test_angles_are_in_float32_whatever_the_model_is_in(checkpoint_7b):
    rotary = load(checkpoint_7b, dtype=torch.bfloat16).model.rotary_emb
    cosines, sines = rotary(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[4000]]))
    angles = 4000 * 10_000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    expected = torch.cat([angles, angles])
    torch.testing.assert_close(cosines[0, 0].double(), expected.cos(), rtol=0, atol=5e-4)
    torch.testing.assert_close(sines[0, 0].double(), expected.sin(), rtol=0, atol=5e-4)


@pytest.mark.parametrize("padded", [True, False])
def test_the_mask_has_a_row_for_each_text_only_where_there_is_padding(
    publish, tmp_path, ids, left, padded
):
    model = load(publish(tmp_path, "13b"), attn_implementation="sdpa")
    seen = []
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(ids, attention_mask=left if padded else None)
    rows = 3 if padded else 1
    assert seen[0].nbytes == rows * 6 * 21**2 * 4  # one mask of all heads, in float32


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_mask_is_refused(checkpoint, kernel):
    with pytest.raises(ValueError, match="BaichuanForCausalLM does not support"):
        load(checkpoint, attn_implementation=kernel)


def test_llamas_plans_for_several_devices_are_not_taken_over(checkpoint):
    """They would cut W_pack across q, k and v, or drop the mask with ALiBi in it."""
    model = load(checkpoint)
    assert not model.supports_tp_plan
    assert not model.supports_pp_plan
    assert not getattr(model, "supports_context_parallel", False)
