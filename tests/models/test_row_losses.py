"""Logits where a label is: the same losses and gradients as with all logits, in less memory."""

from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, LlamaConfig

from fedfora.data.encoding import IGNORED
from fedfora.models import losses
from fedfora.models.baichuan.configuration import BaichuanConfig
from fedfora.models.losses import lies_flat, row_losses, token_losses
from tiny_models import GROUPED, SIZES, gradients, recompute_blocks

CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gemma2, soft caps": Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=2.0),
    "cohere, scaled logits": CohereConfig(**GROUPED, logit_scale=0.3),
    "baichuan, normalized head": BaichuanConfig(**SIZES, position_embedding="alibi"),
}


def a_model(name):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def a_batch():
    """Three rows of 9, 5 and 7 tokens, padded on the right, with answers of 4, 1 and 3 tokens."""
    torch.manual_seed(4)
    lengths, answers = (9, 5, 7), (4, 1, 3)
    ids = torch.randint(3, 97, (3, 9))
    labels = ids.clone()
    mask = torch.zeros_like(ids)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        mask[row, :length] = 1
        labels[row, : length - answer] = IGNORED
        labels[row, length:] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_those_of_all_logits(name):
    model, batch = a_model(name), a_batch()
    expected = model(**batch, use_cache=False).loss
    loss_N, _ = token_losses(model, batch)
    torch.testing.assert_close(loss_N.mean(), expected, rtol=1e-5, atol=1e-6)
    all_logits = gradients(model, expected)
    labeled = gradients(model, loss_N.mean())
    assert labeled.keys() == all_logits.keys()
    for key, grad in all_logits.items():
        torch.testing.assert_close(labeled[key], grad, rtol=1e-4, atol=1e-6)


def test_the_output_layer_sees_labeled_positions_alone():
    model, batch, seen = a_model("llama"), a_batch(), []
    lies_flat(model)
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    loss_N, row_N = token_losses(model, batch)
    assert seen == [(1, 4 + 1 + 3, 97)]
    assert row_N.tolist() == [0] * 4 + [1] + [2] * 3
    assert loss_N.shape == (8,)
    assert model(input_ids=batch["input_ids"]).logits.shape == (3, 9, 97)  # the hook is gone


def test_a_row_loses_alone_what_it_loses_in_a_batch_and_nothing_without_an_answer():
    model, batch = a_model("llama"), a_batch()
    together = row_losses(model, batch)
    for row, length in enumerate((9, 5, 7)):
        alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
        torch.testing.assert_close(row_losses(model, alone)[0], together[row])
    batch["labels"][1] = IGNORED
    without = row_losses(model, batch)
    assert without[1] == 0
    torch.testing.assert_close(without[[0, 2]], together[[0, 2]])
    batch["labels"][:] = IGNORED
    assert row_losses(model, batch).tolist() == [0, 0, 0]


def in_bfloat16(monkeypatch, short, checkpointing=False):
    """Loss and all gradients of a bfloat16 model, as one vector."""
    monkeypatch.setattr(losses, "SHORT", short)
    model = a_model("llama").to(torch.bfloat16)
    if checkpointing:
        recompute_blocks(model)
    loss = row_losses(model, a_batch()).sum()
    found = gradients(model, loss)
    return loss.detach(), torch.cat([found[name].flatten().float() for name in sorted(found)])


def test_short_rows_in_bfloat16_have_gradients_as_good_as_the_fused_kernels(monkeypatch):
    exact = gradients(model := a_model("llama"), row_losses(model, a_batch()).sum())
    exact = torch.cat([exact[name].flatten() for name in sorted(exact)])
    _, plain = in_bfloat16(monkeypatch, 256)
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # as it was
    _, fused = in_bfloat16(monkeypatch, 0)
    assert not plain.equal(fused)  # another kernel, so another rounding
    assert (plain - exact).norm() < 1.2 * (fused - exact).norm() < 0.05 * exact.norm()


def test_blocks_computed_anew_and_passes_without_gradients_stay_fused(monkeypatch):
    short, never = (in_bfloat16(monkeypatch, each, checkpointing=True) for each in (256, 0))
    assert short[0].equal(never[0])
    assert short[1].equal(never[1])
    with torch.no_grad():
        model, found = a_model("llama").to(torch.bfloat16), []
        for short in (256, 0):
            monkeypatch.setattr(losses, "SHORT", short)
            found.append(row_losses(model, a_batch()))
    assert found[0].equal(found[1])


def test_only_short_rows_in_bfloat16_on_a_cpu_leave_the_fused_kernel():
    cases = product(["cpu", "cuda"], [torch.float32, torch.bfloat16], [losses.SHORT, 512])
    plain = [case for case in cases if losses.plain_attention_is_faster(*case)]
    assert plain == [("cpu", torch.bfloat16, losses.SHORT)]
