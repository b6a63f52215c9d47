"""A model and prompts to answers: in batches of similar length, greedily, left-padded."""

from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """Return the model's greedy answer to every prompt, in the order of the prompts.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: Its tokenizer.
        prompts: Token ids as `fedfora.data.encoding.encode_prompt` makes them.
        batch_size: Prompts per batch; prompts of similar length share a batch.
        max_new_tokens: Longest answer.
        on_batch: Called with the number of prompts answered by each batch.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _left_padded([prompts[i] for i in rows], tokenizer.pad_token_id, model.device)
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
        on_batch(len(rows))
    return answers


def _left_padded(
    prompts: list[list[int]], pad_token_id: int, device: Any
) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[pad_token_id] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
