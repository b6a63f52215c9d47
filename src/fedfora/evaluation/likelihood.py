"""A model and encoded rows to how likely their answers are: losses, and the likeliest option."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedfora.data.encoding import Encoded, PromptFormat, encode_example
from fedfora.data.loading import Example
from fedfora.evaluation.generate import batches_by_length
from fedfora.models.batches import collate
from fedfora.models.losses import token_losses


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
    batch_size: int | None = None,
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
    likelihoods = iter(answer_likelihoods(model, rows, batch_size=batch_size))
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


@torch.no_grad()
def answer_likelihoods(
    model: Any,
    rows: Encoded,
    *,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[Likelihood]:
    """Return how likely the answer of each row is, given its prompt.

    Args:
        model: A causal language model, with or without adapter.
        rows: `input_ids` and `labels` as `fedfora.data.encoding.encode_example` makes them.
        batch_size: Rows per batch, as for `batches_by_length`.
        on_batch: Called with the number of rows of each batch.
    """
    model.eval()
    results: dict[int, Likelihood] = {}
    lengths = [len(row["input_ids"]) for row in rows]
    for batch in batches_by_length(model, lengths, batch_size):
        inputs = {n: t.to(model.device) for n, t in collate([rows[i] for i in batch]).items()}
        loss_N, row_N = token_losses(model, inputs)
        sums_B = loss_N.new_zeros(len(batch), dtype=torch.float64)
        sums_B = sums_B.index_add(0, row_N, loss_N.double())
        counts_B = row_N.bincount(minlength=len(batch))
        results |= zip(batch, map(Likelihood, (-sums_B).tolist(), counts_B.tolist()), strict=True)
        on_batch(len(batch))
    return [results[i] for i in range(len(rows))]
