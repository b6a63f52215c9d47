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

from fedfora.data.encoding import Encoded
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

    The interval is that of Hanley and McNeil 1982 (https://doi.org/10.1148/radiology.143.1.7063747).

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
    found = float((members < threshold).double().mean())
    return Separation(auc, max(0.0, auc - margin), min(1.0, auc + margin), found)


def mean_losses(model: Any, tokenizer: Any, encoded: Encoded, *, batch_size: int) -> Tensor:
    """Return the mean loss of each row's answer tokens, of shape `(rows,)`."""
    found = answer_likelihoods(model, tokenizer, encoded, batch_size=batch_size)
    return torch.tensor([-row.log_probability / max(1, row.num_tokens) for row in found])
