"""Membership inference by loss: can one tell rows that were trained on from rows that were not?

The attack of Yeom et al. 2018 (https://arxiv.org/abs/1709.01604, Adversary 1), the simplest one:
a row with a low loss was trained on. Stronger attacks exist, so an AUC near 1/2 proves nothing;
one that is clearly above shows a leak.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedfora.data.canaries import alternatives, canaries
from fedfora.data.encoding import IGNORED, Encoded, PromptFormat, encode_examples
from fedfora.evaluation.likelihood import answer_likelihoods


@dataclass(frozen=True)
class Separation:
    """How well a score tells members from others.

    Args:
        auc: Probability that a random member has a lower loss than a random other row.
        low: Lower end of its 95 % interval.
        high: Upper end.
        true_positive_rate: Share of members found where 1 % of the others are taken for members.
    """

    auc: float
    low: float
    high: float
    true_positive_rate: float


def separation(members: Tensor, others: Tensor) -> Separation:
    """Return how well low losses tell members, of shape `(M,)`, from others, `(N,)`.

    The interval is that of Hanley and McNeil 1982
    (https://doi.org/10.1148/radiology.143.1.7063747).

    Raises:
        ValueError: If one of the two is empty.
    """
    if not len(members) or not len(others):
        raise ValueError("a comparison needs rows that were trained on, and rows that were not")
    below = (members[:, None] < others[None, :]).double().mean()
    equal = (members[:, None] == others[None, :]).double().mean()
    auc = float(below + equal / 2)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (len(members) - 1) * (q1 - auc**2)
    variance += (len(others) - 1) * (q2 - auc**2)
    margin = 1.96 * math.sqrt(max(0.0, variance) / (len(members) * len(others)))
    threshold = others.sort().values[math.floor(0.01 * len(others))]
    detected = float((members < threshold).double().mean())
    return Separation(auc, max(0.0, auc - margin), min(1.0, auc + margin), detected)


def mean_losses(model: Any, tokenizer: Any, encoded: Encoded, *, batch_size: int) -> Tensor:
    """Return the mean loss of each row's answer tokens, of shape `(rows,)`."""
    likelihoods = answer_likelihoods(model, tokenizer, encoded, batch_size=batch_size)
    return torch.tensor([-row.log_probability / max(1, row.num_tokens) for row in likelihoods])


# Exposure: how many bits of a planted secret a model gives away by its losses.
#
# A canary is ranked by loss among N rows that differ from it in nothing but the secret; its
# exposure is log2(N) - log2(rank) (Carlini et al. 2019, https://arxiv.org/abs/1802.08232, Sec.
# 4.2). A model that has not seen it ranks it at random: 1.44 bits on average, as -log2 of a uniform
# number has. One that tells it from all others gives log2(N) bits.


UNSEEN = 1 / math.log(2)  # mean exposure of a canary that was not trained on


def code_losses(
    model: Any,
    tokenizer: Any,
    prompts: PromptFormat,
    *,
    count: int,
    num_alternatives: int,
    seed: int,
    batch_size: int,
) -> list[Tensor]:
    """Return for each of a run's canaries the losses of its code and of others, the own one first.

    Args:
        model: With the adapter that is asked.
        tokenizer: The base's.
        prompts: How rows become prompts.
        count: How many canaries were planted.
        num_alternatives: Other codes that each is ranked among.
        seed: The run's seed.
        batch_size: Rows per forward pass.
    """
    values = []
    for number, canary in enumerate(canaries(count, seed)):
        rows = [canary, *alternatives(number, num_alternatives, seed)]
        encoded = encode_examples(rows, tokenizer, prompts)
        tokens = torch.tensor([sum(t != IGNORED for t in row["labels"]) for row in encoded])
        means = mean_losses(model, tokenizer, encoded, batch_size=batch_size)
        values.append(means * tokens)  # of the whole code: some have more tokens
    return values


def exposure(losses: Tensor) -> float:
    """Return the exposure of the first of `losses`, of shape `(N,)`, among all of them, in bits.

    Equal losses count as lower ones: a model that cannot tell them apart gives nothing away.
    """
    rank = int((losses <= losses[0]).sum())
    return math.log2(len(losses)) - math.log2(rank)
