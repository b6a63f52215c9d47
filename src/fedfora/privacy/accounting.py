"""How much privacy releases cost: their epsilon, by dp-accounting's PLD accountant.

Two data sets are neighbors if a record (or site) of one is empty in the other; their number is
public. The epsilon of adding or removing one is the same.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fedfora.registry import need

LARGEST_NOISE = 1e3  # of a plan: a gradient under this much noise is nothing but noise

# Losses are rounded up to this grid, so a coarser one never understates epsilon; 1e-4 is
# dp-accounting's own. The search for a noise multiplier uses the coarser one: ten times faster.
GRID, SEARCH_GRID = 1e-4, 1e-3


@dataclass(frozen=True)
class Release:
    """Some releases of a clipped sum with normal noise, each over a Poisson sample.

    Args:
        sampling_rate: Probability with which each record is in the sum, in (0, 1].
        noise_multiplier: Standard deviation of the noise over the clipping norm; 0 for none.
        count: How many such releases.
    """

    sampling_rate: float
    noise_multiplier: float
    count: int

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"a sampling rate must be in (0, 1], got {self.sampling_rate}")
        if self.noise_multiplier < 0:
            raise ValueError(f"--noise_multiplier must be at least 0, got {self.noise_multiplier}")
        if self.count < 1:
            raise ValueError(f"a release must happen at least once, got {self.count}")


def epsilon_of(releases: Sequence[Release], delta: float, *, grid: float = GRID) -> float:
    """Return the epsilon of all releases together at `delta`; infinite if one had no noise."""
    return _epsilon(_grouped(releases), delta, grid)


def replace_one_epsilon_of(releases: Sequence[Release], delta: float) -> float:
    """Return the epsilon if one record is replaced by another, not by an empty one."""
    return _epsilon(_grouped(releases), delta, GRID, "REPLACE_ONE")


def epsilon_shown(correct: int, guesses: int, delta: float, *, confidence: float = 0.95) -> float:
    """Return the largest epsilon that guessing coins right refutes: a lower bound on the true one.

    A mechanism saw one of two records for each of `guesses` fair coins, and an attacker guesses the
    coins. With at most this epsilon, this many correct ones have a probability of at most
    1 - `confidence` (Steinke, Nasr, Jagielski 2023, https://arxiv.org/abs/2305.08846, Theorem 5.2).

    Args:
        correct: Guesses that were right.
        guesses: Coins, all of which were guessed.
        delta: The mechanism's.
        confidence: Of the bound, in (0, 1).
    """
    binomial = need("scipy.stats").binom

    def probability(epsilon: float) -> float:
        right = 1 / (1 + math.exp(-epsilon))
        tail = binomial.sf(correct - 1, guesses, right)
        fewer = range(1, correct + 1)
        rise = max(
            ((binomial.sf(correct - i - 1, guesses, right) - tail) / i for i in fewer), default=0
        )
        return float(tail + 2 * guesses * delta * rise)

    low, high = 0.0, 50.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) <= 1 - confidence else (low, middle)
    return low


def _grouped(releases: Sequence[Release]) -> tuple[Release, ...]:
    """Put releases of one mechanism together: composition has no order, and this is quicker."""
    counts: Counter[Release] = Counter()
    for release in releases:
        counts[replace(release, count=1)] += release.count
    return tuple(replace(release, count=count) for release, count in counts.items())


@lru_cache(maxsize=256)  # the sites of a federation often have equally many rows
def noise_multiplier_for(
    *, target_epsilon: float, delta: float, sampling_rate: float, count: int
) -> float:
    """Return the smallest noise multiplier (to 0.1 %) that keeps `count` releases in the budget.

    Raises:
        ValueError: If the budget is so small that no noise up to `LARGEST_NOISE` suffices.
    """

    def spent(noise_multiplier: float) -> float:
        return _epsilon((Release(sampling_rate, noise_multiplier, count),), delta, SEARCH_GRID)

    too_little, enough = 0.0, 1.0
    while spent(enough) > target_epsilon:
        too_little, enough = enough, 2 * enough
        if enough > LARGEST_NOISE:
            raise ValueError(
                f"--target_epsilon {target_epsilon:g} cannot be reached (steps: {count}): even "
                f"noise of {too_little:.0f} times the clipping norm leaves epsilon "
                f"{spent(too_little):.2g}"
            )
    while enough - too_little > 1e-3 * enough:
        middle = (enough + too_little) / 2
        # Very little noise makes the accountant slow and epsilon large: no need to compute it.
        within = middle > 0.05 and spent(middle) <= target_epsilon
        too_little, enough = (too_little, middle) if within else (middle, enough)
    return enough


@lru_cache(maxsize=1024)
def _epsilon(
    releases: tuple[Release, ...], delta: float, grid: float, relation: str = "ADD_OR_REMOVE_ONE"
) -> float:
    if not releases:
        return 0.0
    if any(release.noise_multiplier == 0 for release in releases):
        return float("inf")
    dp = need("dp_accounting")
    accountant = need("dp_accounting.pld").PLDAccountant(
        neighboring_relation=dp.NeighboringRelation[relation], value_discretization_interval=grid
    )
    for release in releases:
        event = dp.GaussianDpEvent(release.noise_multiplier)
        accountant.compose(dp.PoissonSampledDpEvent(release.sampling_rate, event), release.count)
    return float(accountant.get_epsilon(delta))
