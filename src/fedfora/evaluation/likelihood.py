"""A model and encoded rows to how likely their answers are: losses, and the likeliest option."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedfora.data.encoding import IGNORED, PromptFormat, encode_example
from fedfora.data.loading import Example
from fedfora.evaluation.generate import batches_by_length

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Likelihood:
    """Log-probability of an answer, in nats, and the number of its tokens, end included."""

    log_probability: float
    num_tokens: int


def option_likelihoods(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    options: Sequence[Sequence[str]],
    prompt_format: PromptFormat,
    *,
    batch_size: int,
) -> list[list[float]]:
    """Return for each row the log-probability of each of its options as the whole answer.

    End-of-sequence is part of the answer: so no option is a mere beginning of another one, none is
    favored for being short, and these are the probabilities of different answers.
    """
    rows = [
        encode_example(replace(example, output=option), tokenizer, prompt_format)
        for example, own in zip(examples, options, strict=True)
        for option in own
    ]
    likelihoods = iter(answer_likelihoods(model, tokenizer, rows, batch_size=batch_size))
    return [[next(likelihoods).log_probability for _ in own] for own in options]


def loss_scores(likelihoods: Sequence[Likelihood]) -> dict[str, float]:
    """Return rows, mean loss per token of the references, and its exponential, the perplexity."""
    num_tokens = sum(each.num_tokens for each in likelihoods)
    loss = -sum(each.log_probability for each in likelihoods) / num_tokens
    return {
        "rows": len(likelihoods),
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
    }


def answer_likelihoods(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    *,
    batch_size: int,
    padding_side: Side = "left",
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[Likelihood]:
    """Return how likely the answer of each row is, given its prompt.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: Its tokenizer.
        rows: `input_ids` and `labels` as `fedfora.data.encoding.encode_example` makes them.
        batch_size: Rows per batch.
        padding_side: On the left, answers end together, and only their logits are computed.
        on_batch: Called with the number of rows of each batch.
    """
    model.eval()
    results: dict[int, Likelihood] = {}
    for batch in batches_by_length([len(row["input_ids"]) for row in rows], batch_size):
        chosen = [rows[i] for i in batch]
        results |= zip(batch, _of_batch(model, tokenizer, chosen, padding_side), strict=True)
        on_batch(len(batch))
    return [results[i] for i in range(len(rows))]


@torch.no_grad()
def _of_batch(
    model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], side: Side
) -> list[Likelihood]:
    device = model.device
    ids_BL = _padded([row["input_ids"] for row in rows], tokenizer.pad_token_id, side).to(device)
    labels_BL = _padded([row["labels"] for row in rows], IGNORED, side).to(device)
    mask_BL = _padded([[1] * len(row["input_ids"]) for row in rows], 0, side).to(device)
    longest_answer = max(sum(label != IGNORED for label in row["labels"]) for row in rows)
    keep = longest_answer + 1 if side == "left" else 0  # 0 is all of them
    logits_BKV = model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=(mask_BL.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=keep,
        use_cache=False,
    ).logits
    next_BK = labels_BL[:, -logits_BKV.shape[1] :][:, 1:]
    answer_BK = next_BK != IGNORED
    log_BKV = logits_BKV[:, :-1].float().log_softmax(-1)
    log_BK = log_BKV.gather(-1, next_BK.clamp(min=0)[..., None])[..., 0] * answer_BK
    sums, counts = log_BK.double().sum(1).tolist(), answer_BK.sum(1).tolist()
    return [Likelihood(*pair) for pair in zip(sums, counts, strict=True)]


def _padded(rows: list[list[int]], value: int, side: Side) -> Tensor:
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    both = zip(fill, rows, strict=True)
    return torch.tensor([f + row if side == "left" else row + f for f, row in both])
