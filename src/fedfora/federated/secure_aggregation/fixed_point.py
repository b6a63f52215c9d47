"""Numbers to fixed point in uint32 and back, so that sums are exact and masks hide perfectly.

A site's number x travels as q = round(clip(x, -R, R) * w / W * Q / R) modulo 2^32, times its weight
w so that the weights stay hidden too: the mean is the sum of the q over the sum of the w. With
Q = floor((2^31 - 1) / K) levels the sum over K sites cannot wrap around.

Counts (the weight, rows, clipped numbers) travel as they are, in uint32.

Symbols: R = value range, W = largest weight, K = sites, Q = levels, N = numbers.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.floating[Any]]

WORD = 2**32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FixedPoint:
    """A fixed point that all sites of a round share.

    Args:
        value_range: R; numbers outside [-R, R] are clipped, and counted.
        num_sites: K, the most vectors that are added up; at least 1.
        max_weight: W; no weight is larger.

    Raises:
        ValueError: If the range is not positive, or K sites of weight W do not fit into 32 bits.
    """

    value_range: float
    num_sites: int
    max_weight: int

    def __post_init__(self) -> None:
        if not 0 < self.value_range < math.inf:
            raise ValueError(f"--secagg_range must be positive, got {self.value_range}")
        if self.num_sites < 1 or self.max_weight < 1:
            raise ValueError(
                f"sites and largest weight must be at least 1, got {self.num_sites} sites and "
                f"a largest weight of {self.max_weight}"
            )
        if self.num_sites * self.max_weight >= WORD:
            raise ValueError(
                f"{self.num_sites} sites with weights of up to {self.max_weight} do not fit into "
                "32 bits: use fewer sites a round, fewer steps, or smaller batches"
            )

    @property
    def levels(self) -> int:
        """Q: steps from 0 to the range."""
        return (2**31 - 1) // self.num_sites

    @property
    def step(self) -> float:
        """R / Q: the smallest difference that two numbers can have."""
        return self.value_range / self.levels

    @property
    def max_count(self) -> int:
        """The largest count of one site, so that the sum over all does not wrap around."""
        return (WORD - 1) // self.num_sites

    def max_error(self, total_weight: int) -> float:
        """Return the largest distance of a decoded mean from the exact one, without clipping.

        Each site rounds by at most half a step, R / (2 Q), of a number times w / W.
        """
        half_step = self.value_range / (2 * self.levels)
        return self.num_sites * half_step * self.max_weight / total_weight

    def encode(self, values_N: Floats, weight: int) -> tuple[Words, int]:
        """Return a site's numbers times its weight, and how many of them were clipped.

        Raises:
            ValueError: If a number is not finite, or the weight is not in 1 ... W.
        """
        if not 1 <= weight <= self.max_weight:
            raise ValueError(f"a weight must be between 1 and {self.max_weight}, got {weight}")
        values = values_N.astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("the update holds numbers that are not finite")
        clipped = int(np.count_nonzero(np.abs(values) > self.value_range))
        np.clip(values, -self.value_range, self.value_range, out=values)
        values *= weight / self.max_weight * self.levels / self.value_range
        return np.rint(values, out=values).astype(np.int32).view(np.uint32), clipped

    def decode(self, total_N: Words, total_weight: int) -> NDArray[np.float64]:
        """Return the weighted mean from the sum of encoded vectors, modulo 2^32, and of weights."""
        unit = self.value_range / self.levels * self.max_weight / total_weight
        mean: NDArray[np.float64] = total_N.view(np.int32).astype(np.float64) * unit
        return mean

    def encode_counts(self, counts: list[int]) -> Words:
        """Return counts as words; one too large for the sum to hold becomes `max_count`."""
        return np.array([min(max(0, count), self.max_count) for count in counts], dtype=np.uint32)


# A site's contribution as words, and the sum of all contributions read again.
#
#     words = [ numbers of the update | loss | weight, clipped numbers, shortened updates ]
#
# The first two in fixed point times the weight, the last three as counts. So the coordinator learns
# neither how much one site trained on, nor how well, nor whose numbers were clipped.

MAX_LOSS = 32.0  # in nats for each token; the logarithm of 10^13 tokens
COUNTS = 3
ROUNDING = 1e-9  # more than the error of a norm in float64


@dataclass(frozen=True)
class Summed:
    """What the coordinator learns from a round.

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
    """Return how many words an update of `num_numbers` numbers makes."""
    return num_numbers + 1 + COUNTS


def contribution(
    update_N: Floats, *, weight: int, loss: float, code: FixedPoint, max_norm: float
) -> Words:
    """Return what a site adds to the sum, to be masked.

    Args:
        update_N: Its numbers, as the difference from what it received.
        weight: Its weight, from 1 on.
        loss: Its mean loss; anything above `MAX_LOSS` counts as that.
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
    if clipped:
        told = "numbers of the update beyond --secagg_range %g, clipped: %d"
        logger.warning(told, code.value_range, clipped)
    if shortened:
        logger.warning("the update is longer than --max_update_norm %g: shortened", max_norm)
    counts = code.encode_counts([weight, clipped, int(shortened)])
    return np.concatenate([words, counts])


def contribution_with_noise(
    update_N: Floats, noise_N: NDArray[np.int64], *, code: FixedPoint, clipping_norm: float | None
) -> Words:
    """Return what a site adds to the sum if single sites are hidden by noise.

    Nothing in it depends on the site but the update, cut to the clipping norm: it weighs 1, and
    tells no loss and no counts. If an update has numbers that are not finite, only the noise is
    sent. The sum of both is not clipped, as that would change the noise: what leaves the range
    wraps around, and comes back in the sum.

    Args:
        update_N: The site's numbers, as the difference from what it received.
        noise_N: Its share of the noise, in steps of the fixed point.
        code: The fixed point of the round; its largest weight is 1.
        clipping_norm: C. Rounding to the grid may add to a length, so a little less is kept. None
            for sums of what is clipped already: each number is cut to half of the range, which
            moves no two sums further apart.
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
    steps = np.rint(np.append(values, 0.0) / code.step).astype(np.int64) + np.append(noise_N, 0)
    words = (steps & (WORD - 1)).astype(np.uint32)
    return np.concatenate([words, code.encode_counts([1, 0, 0])])


def read_sum(total: Words, code: FixedPoint) -> Summed:
    """Return what a sum of contributions says; raise if the sites cannot have sent such counts."""
    weight, clipped, shortened = (int(count) for count in total[-COUNTS:])
    possible = 0 < weight <= code.num_sites * code.max_weight
    if not possible or shortened > code.num_sites or clipped > code.num_sites * len(total):
        raise ValueError(
            "the sum makes no sense: sites were given different adapters or settings, or one of "
            "them sent something other than its update"
        )
    numbers = code.decode(total[:-COUNTS], weight)
    loss = float(numbers[-1]) / code.value_range * MAX_LOSS
    return Summed(numbers[:-1], loss, weight, clipped, shortened)
