"""A model and rows with answers to the mean loss per answer token, without generating anything."""

from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

Encoded = list[dict[str, list[int]]]


@torch.no_grad()
def answer_loss(
    model: Any, tokenizer: Any, encoded: Encoded, *, batch_size: int
) -> tuple[float, int]:
    """Return the mean cross-entropy over all answer tokens, in nats, and how many there are.

    The model is left in evaluation mode. No rows give `(0.0, 0)`.

    Args:
        model: The model with its adapter.
        tokenizer: Pads the batches.
        encoded: Rows with `input_ids` and `labels`.
        batch_size: Rows per forward pass.
    """
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = collate(encoded[start : start + batch_size]).to(model.device)
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return (total / tokens if tokens else 0.0), tokens
