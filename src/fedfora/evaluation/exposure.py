"""Exposure: how many bits of a planted secret a model gives away by its losses.

A canary is ranked by loss among N rows that differ from it in nothing but the secret; its exposure
is log2(N) - log2(rank) (Carlini et al. 2019, https://arxiv.org/abs/1802.08232, Sec. 4.2). A model
that has not seen it ranks it at random: 1.44 bits on average, as -log2 of a uniform number has.
One that tells it from all others gives log2(N) bits.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fedfora.data.canaries import alternatives, canaries
from fedfora.data.encoding import IGNORED, PromptFormat, encode_examples
from fedfora.evaluation.membership import mean_losses

UNSEEN = 1 / math.log(2)  # mean exposure of a canary that was not trained on


def exposures(
    model: Any,
    tokenizer: Any,
    prompts: PromptFormat,
    *,
    count: int,
    num_alternatives: int,
    seed: int,
    batch_size: int,
) -> list[float]:
    """Return the exposure of each of a run's canaries, in bits.

    Args:
        model: With the adapter that is asked.
        tokenizer: The base's.
        prompts: How rows become prompts.
        count: How many canaries were planted.
        num_alternatives: Other codes that each is ranked among.
        seed: The run's seed.
        batch_size: Rows per forward pass.
    """
    found = []
    for number, canary in enumerate(canaries(count, seed)):
        rows = [canary, *alternatives(number, num_alternatives, seed)]
        encoded = encode_examples(rows, tokenizer, prompts)
        tokens = torch.tensor([sum(t != IGNORED for t in row["labels"]) for row in encoded])
        means = mean_losses(model, tokenizer, encoded, batch_size=batch_size)
        found.append(exposure(means * tokens))  # of the whole code: some have more tokens
    return found


def exposure(losses: Tensor) -> float:
    """Return the exposure of the first of `losses`, of shape `(N,)`, among all of them, in bits.

    Equal losses count as lower ones: a model that cannot tell them apart gives nothing away.
    """
    rank = int((losses <= losses[0]).sum())
    return math.log2(len(losses)) - math.log2(rank)
