"""A site's contribution as words, and the sum of all contributions read again.

    words = [ numbers of the update | loss | weight, clipped numbers, shortened updates ]

The first two in fixed point times the weight, the last three as counts. So the coordinator learns
neither how much one site trained on, nor how well, nor whose numbers were clipped.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfora.federated.secure_aggregation.fixed_point import FixedPoint, Floats, Words

MAX_LOSS = 32.0  # in nats for each token; the logarithm of 10^13 tokens
COUNTS = 3
ROUNDING = 1e-9  # more than a norm in float64 can be wrong by


@dataclass(frozen=True)
class Contribution:
    """What one site adds to the sum.

    Args:
        words: To be masked.
        clipped: How many of its numbers were out of range.
        shortened: Whether the update was longer than allowed.
    """

    words: Words
    clipped: int
    shortened: bool


@dataclass(frozen=True)
class Summed:
    """What the coordinator learns of a round.

    Args:
        mean_N: Weighted mean of the updates.
        loss: Weighted mean of the losses.
        weight: Sum of the weights.
        clipped: Numbers out of range, of all sites.
        shortened: Sites whose update was longer than allowed.
    """

    mean_N: NDArray[np.float64]
    loss: float
    weight: int
    clipped: int
    shortened: int


def vector_size(num_numbers: int) -> int:
    """Return how many words an update of so many numbers makes."""
    return num_numbers + 1 + COUNTS


def contribution(
    update_N: Floats, *, weight: int, loss: float, code: FixedPoint, max_norm: float
) -> Contribution:
    """Return what a site adds to the sum.

    Args:
        update_N: Its numbers, as the difference from what it received.
        weight: Its weight, from 1 on.
        loss: Its mean loss; above `MAX_LOSS` it counts as that.
        code: The fixed point of the round.
        max_norm: A longer update is shortened to this length; infinity for no limit.

    Raises:
        ValueError: If a number is not finite, or the weight is out of its bounds.
    """
    norm = float(np.linalg.norm(update_N.astype(np.float64)))
    shortened = norm > max_norm
    scale = max_norm / norm if shortened else 1.0
    loss_in_range = min(max(loss, 0.0), MAX_LOSS) / MAX_LOSS * code.value_range
    numbers = np.append(update_N.astype(np.float64) * scale, loss_in_range)
    words, clipped = code.encode(numbers, weight)
    counts = code.encode_counts([weight, clipped, int(shortened)])
    return Contribution(np.concatenate([words, counts]), clipped, shortened)


def contribution_with_noise(
    update_N: Floats, noise_N: NDArray[np.int64], *, code: FixedPoint, clipping_norm: float | None
) -> Contribution:
    """Return what a site adds to the sum where single sites are hidden by noise.

    Nothing in it depends on the site but the update, cut to the clipping norm: it weighs 1, and
    tells no loss and no counts. Of an update with numbers that are none, the noise is left.

    Args:
        update_N: The site's numbers, as the difference from what it received.
        noise_N: Its share of the noise, in steps of the fixed point.
        code: The fixed point of the round; its largest weight is 1.
        clipping_norm: C. Rounding to the grid may add to a length, so a little less is kept. None
            for sums of what is clipped already: each number is cut to half of the range, which
            brings no two sums further apart.
    """
    values = update_N.astype(np.float64)
    norm, longest = float(np.linalg.norm(values)), math.inf
    if clipping_norm is None:
        np.clip(values, -code.value_range / 2, code.value_range / 2, out=values)
    else:
        longest = (1 - ROUNDING) * clipping_norm - code.step * math.sqrt(len(values)) / 2
    if not math.isfinite(norm):
        values = np.zeros_like(values)
    elif norm > longest:
        values *= longest / norm
    words = code.encode_with_noise(np.append(values, 0.0), np.append(noise_N, 0))
    return Contribution(np.concatenate([words, code.encode_counts([1, 0, 0])]), 0, False)


def read_sum(total: Words, code: FixedPoint) -> Summed:
    """Return what a sum of contributions says.

    Raises:
        ValueError: If the counts cannot be those of the sites.
    """
    weight, clipped, shortened = (int(count) for count in total[-COUNTS:])
    possible = 0 < weight <= code.num_sites * code.max_weight
    if not possible or shortened > code.num_sites or clipped > code.num_sites * len(total):
        raise ValueError(
            "the sum makes no sense: sites were given different adapters or settings, or one of "
            "them sent something else than its update"
        )
    numbers = code.decode(total[:-COUNTS], weight)
    loss = float(numbers[-1]) / code.value_range * MAX_LOSS
    return Summed(numbers[:-1], loss, weight, clipped, shortened)
