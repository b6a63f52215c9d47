"""Noise that nobody can remove: each site adds a share, before it masks.

It hides whole sites, or single records: then a round is one step, and what a site sends is the sum
of its sample's clipped gradients.

As in the distributed Gaussian mechanism (Kairouz et al. 2021, https://arxiv.org/abs/2102.06387):
the coordinator opens sums of at least t vectors and no others, which every site checks for itself
before it helps, so t shares are in every sum that anybody sees. One of them may belong to a curious
site: a share has standard deviation z C / sqrt(t - 1). More survivors than t only add noise, and
the account counts none of it.

The noise is exact: integers, in steps of the fixed point, from the discrete normal distribution
(Canonne et al. 2020, https://arxiv.org/abs/2004.00010), so no floating-point number comes between
the account and what is released. It is accounted as normal noise, and is no worse than that:

A discrete normal number of variance s^2 is a normal one of variance s^2 - r^2, rounded at random to
the integers with a discrete normal of variance r^2 around it (Peikert 2010,
https://eprint.iacr.org/2010/088, Thm. 3.1), but for a factor of 1 +- 4 exp(-2 pi^2 r^2) on every
probability. Sums of discrete normals are discrete normals up to a smaller factor still. Rounding is
post-processing, so the sum is as private as with normal noise of the variance less r^2. With r = 8
the factor is 1 + 10^-540 and shows in no account; a share is made wider by a step for the rest.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedfora.federated.secure_aggregation.fixed_point import FixedPoint
from fedfora.federated.secure_aggregation.messages import NUM_CURIOUS_SITES, Terms
from fedfora.federated.settings import FederationSettings
from fedfora.privacy.accounting import Release
from fedfora.privacy.clipping import Integers, SecretNoise
from fedfora.privacy.settings import noise_of

# Of records a site sends the sum of their clipped gradients over this many clipping norms, so that
# it fits into the range of the fixed point: a record moves it by 1 / ROWS_OF_UNIT at most.
ROWS_OF_UNIT = 256
HEADROOM_STDS = 8.0  # standard deviations of the sum's noise that must fit before it wraps around
MIN_STEPS_PER_STD = 1000  # steps of the grid in one standard deviation, at least


@dataclass(frozen=True)
class SharedNoise:
    """What a site does to its update so that the sum hides single sites, or single records.

    Args:
        noise_multiplier: z, of every sum that can be opened.
        clipping_norm: C, the most by which what is hidden can move the sum.
        of_records: Whether single records are hidden, each of which is clipped already.
    """

    noise_multiplier: float
    clipping_norm: float
    of_records: bool = False

    @classmethod
    def of(cls, settings: FederationSettings) -> "SharedNoise":
        """Return the noise of a run's rounds; for records, in units of `ROWS_OF_UNIT` C."""
        multiplier, privacy = shared_release(settings, 1).noise_multiplier, settings.privacy
        norm = 1 / ROWS_OF_UNIT if privacy.shared_noise else privacy.clipping_norm
        return cls(multiplier, norm, privacy.shared_noise)

    def std(self, terms: Terms) -> float:
        """Return the standard deviation of one site's share."""
        if not self.noise_multiplier:
            return 0.0
        fewest = terms.min_survivors - NUM_CURIOUS_SITES
        return self.noise_multiplier * self.clipping_norm / math.sqrt(fewest)

    def draw(self, count: int, terms: Terms, code: FixedPoint) -> Integers:
        """Return one site's share of the noise on `count` numbers, in steps of the fixed point."""
        if not self.noise_multiplier:
            return np.zeros(count, dtype=np.int64)
        steps = self.std(terms) / code.step
        if self.of_records:  # a record can move each number's rounding by a step, too
            steps *= 1 + code.step * math.sqrt(count) / self.clipping_norm
        return SecretNoise().discrete_normal(count, math.ceil(steps) + 1)

    def check(self, terms: Terms, code: FixedPoint) -> None:
        """Raise if the fixed point is too narrow for the noise, or too coarse.

        Raises:
            ValueError: Naming --secagg_range and what it must be.
        """
        std, sites = self.std(terms), len(terms.participants)
        needed = self.clipping_norm + HEADROOM_STDS * std / math.sqrt(sites)
        if not code.value_range >= needed:
            raise ValueError(
                f"--secagg_range {code.value_range:g} does not hold updates of length "
                f"{self.clipping_norm:g} and the noise of {sites} sites: use at least "
                f"{math.ceil(1000 * needed) / 1000:g}"
            )
        if std and std < MIN_STEPS_PER_STD * code.step:
            raise ValueError(
                f"--secagg_range {code.value_range:g} makes steps of {code.step:.2g}, too coarse "
                f"for noise of {std:.2g}: use a smaller range"
            )


def shared_release(settings: FederationSettings, num_rounds: int) -> Release:
    """Return what a number of rounds releases if sites share the noise."""
    privacy, planned = settings.privacy, settings.federation.num_rounds
    rate = settings.train.sampling_rate(privacy, 1) if privacy.shared_noise else 1.0
    noise = noise_of(privacy, count=planned, sampling_rate=rate)
    return Release(rate, noise, num_rounds)
