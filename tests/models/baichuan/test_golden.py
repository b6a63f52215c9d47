"""The published code's own outputs on tiny checkpoints, made with transformers 4.36.2.

Each directory holds a checkpoint as published and `expected.safetensors`: token ids, a mask with
padding on the left, logits without and with it, greedy tokens after the padded rows, and training
losses, in the padded case without the first token of each row, which padding would predict.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

GOLDEN = Path(
    os.environ.get("FEDFORA_BAICHUAN_GOLDEN")
    or Path(__file__).parents[4] / "shared" / "data" / "baichuan_golden"
)

pytestmark = [
    pytest.mark.skipif(
        not (GOLDEN / "7b" / "expected.safetensors").is_file(),
        reason="the published code's outputs are not here (set FEDFORA_BAICHUAN_GOLDEN)",
    ),
    pytest.mark.parametrize("size", ["7b", "13b"]),
    pytest.mark.parametrize("attention", ["sdpa", "eager"]),
]


@pytest.fixture
def model(size, attention):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / size, attn_implementation=attention).eval()


@pytest.fixture
def golden(size):
    return load_file(GOLDEN / size / "expected.safetensors")


@torch.no_grad()
def test_logits(model, golden):
    got = model(golden["ids"]).logits
    torch.testing.assert_close(got, golden["eval_logits_full"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_with_padding(model, golden):
    got = model(golden["ids"], attention_mask=golden["left"]).logits
    real = golden["left"].bool()
    torch.testing.assert_close(got[real], golden["eval_logits_left"][real], rtol=0, atol=1e-5)


def test_losses(model, golden):
    ids, left = golden["ids"], golden["left"]
    predicted = left.clone()
    predicted[:, 1:] *= left[:, :-1]
    model.train()
    full = model(ids, labels=ids).loss
    padded = model(ids, attention_mask=left, labels=ids.masked_fill(predicted == 0, -100)).loss
    torch.testing.assert_close(full, golden["train_loss_full"], rtol=0, atol=2e-6)
    torch.testing.assert_close(padded, golden["train_loss_left"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_tokens(model, golden, cache):
    ids = golden["ids"].masked_fill(golden["left"] == 0, 0)
    options = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.0}
    got = model.generate(ids, attention_mask=golden["left"], **options, **cache)
    assert torch.equal(got, golden["gen_left"])
