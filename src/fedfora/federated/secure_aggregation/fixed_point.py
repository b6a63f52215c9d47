"""Numbers to fixed point in uint32 and back, so that sums are exact and masks hide perfectly.

A site's number x travels as q = round(clip(x, -R, R) * w / W * Q / R) modulo 2^32, times its weight
w so that the weights stay hidden too: the mean is the sum of the q over the sum of the w. With
Q = floor((2^31 - 1) / K) levels the sum over K sites cannot wrap around.

Counts (the weight, rows, clipped numbers) travel as they are, in uint32.

Symbols: R = value range, W = largest weight, K = sites, Q = levels, N = numbers.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.floating[Any]]

WORD = 2**32


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
        """Refuse what cannot be added up in 32 bits."""
        if not 0 < self.value_range < math.inf:
            raise ValueError(f"--secagg_range must be positive, got {self.value_range}")
        if self.num_sites < 1 or self.max_weight < 1:
            raise ValueError(
                f"sites and largest weight must be at least 1, got {self.num_sites} sites and "
                f"a largest weight of {self.max_weight}"
            )
        if self.num_sites * self.max_weight >= WORD:
            raise ValueError(
                f"{self.num_sites} sites with weights of up to {self.max_weight} do not add up in "
                "32 bits: fewer sites a round, fewer steps, or smaller batches"
            )

    @property
    def levels(self) -> int:
        """Q: steps from 0 to the range."""
        return (2**31 - 1) // self.num_sites

    @property
    def step(self) -> float:
        """R / Q: the distance of two numbers that can be told apart."""
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

    def encode_with_noise(self, values_N: Floats, noise_N: NDArray[np.int64]) -> Words:
        """Return numbers plus noise modulo 2^32; of weight 1.

        Nothing is clipped, as that would make the noise another one: what leaves the range wraps
        around, and comes back in the sum.

        Args:
            values_N: Numbers.
            noise_N: In steps of the grid.
        """
        words = np.rint(values_N.astype(np.float64) / self.step).astype(np.int64) + noise_N
        return (words & (WORD - 1)).astype(np.uint32)

    def decode(self, total_N: Words, total_weight: int) -> NDArray[np.float64]:
        """Return the weighted mean from the sum of encoded vectors.

        Args:
            total_N: Sum modulo 2^32.
            total_weight: Sum of the weights.
        """
        if total_weight < 1:
            raise ValueError(f"the weights must add up to at least 1, got {total_weight}")
        unit = self.value_range / self.levels * self.max_weight / total_weight
        mean: NDArray[np.float64] = total_N.view(np.int32).astype(np.float64) * unit
        return mean

    def encode_counts(self, counts: list[int]) -> Words:
        """Return counts as words; one too large for the sum to hold becomes `max_count`."""
        return np.array([min(max(0, count), self.max_count) for count in counts], dtype=np.uint32)
