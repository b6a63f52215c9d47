"""How much privacy has been spent, and when to stop: a ledger over dp-accounting's PLD accountant.

The ledger lists releases; epsilon is always computed from the whole list, so it composes over
steps, rounds, resumes and runs. It is written before a release happens: a run that is killed has
spent what it was about to spend, never less than it has shown.

Two data sets are neighbors if one has one record (or site) more than the other.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedfora.registry import need

# Losses are rounded up to this grid, so a coarser one never understates epsilon; 1e-4 is
# dp-accounting's own. The search for a noise multiplier uses the coarser one: ten times faster.
GRID, SEARCH_GRID = 1e-4, 1e-3


class BudgetSpent(ValueError):
    """A release would exceed the budget; nothing was released."""


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
        """Refuse what no mechanism can be."""
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"a sampling rate must be in (0, 1], got {self.sampling_rate}")
        if self.noise_multiplier < 0:
            raise ValueError(f"--noise_multiplier must be at least 0, got {self.noise_multiplier}")
        if self.count < 1:
            raise ValueError(f"a release happens at least once, got {self.count}")


@dataclass
class Ledger:
    """What has been released about one site's records (or about the sites), and the budget.

    Args:
        delta: The probability delta of (epsilon, delta)-differential privacy.
        target_epsilon: The budget; None keeps the account and refuses nothing.
        path: Where the ledger lies; None keeps it in memory.
        releases: What was released.
        unfinished: What was paid for and has not ended; going on with it costs nothing more.
    """

    delta: float
    target_epsilon: float | None = None
    path: Path | None = None
    releases: list[Release] = field(default_factory=list)
    unfinished: str | None = None

    @classmethod
    def open(cls, path: Path, *, delta: float, target_epsilon: float | None) -> "Ledger":
        """Return the ledger at `path` under a budget; an empty one where there is no file.

        Raises:
            ValueError: If the file is no ledger: privacy is not spent on a guess.
        """
        if not path.exists():
            return cls(delta, target_epsilon, path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            releases = [Release(**line) for line in content["releases"]]
            unfinished = content["unfinished"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no privacy ledger: {error}") from error
        return cls(delta, target_epsilon, path, releases, unfinished)

    @property
    def epsilon(self) -> float:
        """What has been spent, at the ledger's delta."""
        return epsilon_of(self.releases, self.delta)

    def check(self, release: Release) -> None:
        """Raise if a release would exceed the budget.

        Raises:
            BudgetSpent: Saying what is left.
        """
        if self.target_epsilon is None:
            return
        after = epsilon_of([*self.releases, release], self.delta)
        if after > self.target_epsilon:
            raise BudgetSpent(
                f"the privacy budget does not allow {release.count} more steps: epsilon would be "
                f"{after:.3f}, --target_epsilon is {self.target_epsilon:g} and {self.epsilon:.3f} "
                f"is spent ({self._where()}); {self.left(release)} such steps are left"
            )

    def begin(self, what: str, release: Release) -> None:
        """Enter a release before it happens, unless it was entered and broken off.

        What was lost when a training was killed has been seen by nobody; what goes on from its
        checkpoint takes its place. A release that had ended may have been seen: repeating it costs
        again.

        Args:
            what: Which training or round; the same one goes on.
            release: Its steps.

        Raises:
            BudgetSpent: If it would exceed the budget; then nothing is entered.
        """
        if self.unfinished == what:
            return
        self.check(release)
        self.unfinished = what
        self.spend(release)

    def finish(self) -> None:
        """Note that what was begun has ended, before anybody sees the result."""
        self.unfinished = None
        self._write()

    def spend(self, release: Release) -> None:
        """Enter a release, on disk too, before it happens.

        Raises:
            BudgetSpent: If it would exceed the budget; then nothing is entered.
        """
        self.check(release)
        last = self.releases[-1] if self.releases else None
        if last is not None and last == replace(release, count=last.count):
            self.releases[-1] = replace(last, count=last.count + release.count)
        else:
            self.releases.append(release)
        self._write()

    def left(self, release: Release) -> int:
        """Return how many of the release's steps still fit into the budget."""
        fits, too_many = 0, release.count
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            some = replace(release, count=middle)
            within = epsilon_of([*self.releases, some], self.delta) <= (self.target_epsilon or 0)
            fits, too_many = (middle, too_many) if within else (fits, middle)
        return fits

    def as_json(self) -> dict[str, Any]:
        """Return what is written to disk."""
        return {
            "delta": self.delta,
            "target_epsilon": self.target_epsilon,
            "epsilon": self.epsilon if self.epsilon != float("inf") else None,
            "unfinished": self.unfinished,
            "releases": [asdict(release) for release in self.releases],
        }

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def _where(self) -> str:
        return f"see {self.path}" if self.path else "in this run"


def epsilon_of(releases: Sequence[Release], delta: float) -> float:
    """Return the epsilon of all releases together at `delta`; infinite if one had no noise."""
    return _epsilon(tuple(releases), delta, GRID)


def noise_multiplier_for(
    *, target_epsilon: float, delta: float, sampling_rate: float, count: int
) -> float:
    """Return the smallest noise multiplier (to 0.1 %) that keeps `count` releases in the budget.

    Raises:
        ValueError: If the budget is so small that no noise up to 10,000 suffices.
    """
    if not target_epsilon > 0:
        raise ValueError(f"--target_epsilon must be positive, got {target_epsilon}")
    return _calibrated(target_epsilon, delta, sampling_rate, count)


@lru_cache(maxsize=256)  # the sites of a federation often have equally many rows
def _calibrated(target_epsilon: float, delta: float, sampling_rate: float, count: int) -> float:
    def spent(noise_multiplier: float) -> float:
        return _epsilon((Release(sampling_rate, noise_multiplier, count),), delta, SEARCH_GRID)

    too_little, enough = 0.0, 1.0
    while spent(enough) > target_epsilon:
        too_little, enough = enough, 2 * enough
        if enough > 1e4:
            raise ValueError(f"--target_epsilon {target_epsilon} asks for noise beyond reason")
    while enough - too_little > 1e-3 * enough:
        middle = (enough + too_little) / 2
        # Very little noise makes the accountant slow and epsilon large: no need to compute it.
        within = middle > 0.05 and spent(middle) <= target_epsilon
        too_little, enough = (too_little, middle) if within else (middle, enough)
    return enough


@lru_cache(maxsize=1024)
def _epsilon(releases: tuple[Release, ...], delta: float, grid: float) -> float:
    if not releases:
        return 0.0
    if any(release.noise_multiplier == 0 for release in releases):
        return float("inf")
    dp = need("dp_accounting")
    accountant = need("dp_accounting.pld").PLDAccountant(value_discretization_interval=grid)
    for release in releases:
        event = dp.GaussianDpEvent(release.noise_multiplier)
        accountant.compose(dp.PoissonSampledDpEvent(release.sampling_rate, event), release.count)
    return float(accountant.get_epsilon(delta))


# What differential privacy was given, in one sentence with its assumptions.


NONE = "No differential privacy: the noise multiplier is 0."
ACCOUNTED = "accounted by dp-accounting's PLD accountant"
FLOATS = "floating-point numbers are as good as real ones"


def record_statement(ledger: Ledger, *, clipping_norm: float, num_rows: int) -> str:
    """Return the guarantee for each record of a site.

    Args:
        ledger: What was released.
        clipping_norm: C.
        num_rows: Records of the site, which counts as public.
    """
    if ledger.epsilon == float("inf"):
        return NONE
    steps, noise = _steps_and_noise(ledger)
    return (
        f"Each of the {num_rows} training records has {_level(ledger, 'one record')} against "
        f"anyone who sees every gradient step of this site: {steps} steps of DP-SGD with Poisson "
        f"sampling, gradients clipped to {clipping_norm:g} and noise multiplier {noise}, "
        f"{ACCOUNTED}; assumed: one person's data are one record, the number of records is "
        f"public, noise and samples stay secret, {FLOATS}, and the losses in the site's own log "
        "stay there."
    )


def site_statement(
    ledger: Ledger, *, clipping_norm: float, num_sites: int, min_noise_shares: int = 0
) -> str:
    """Return the guarantee for each site of a federation.

    Args:
        ledger: What was released.
        clipping_norm: C.
        num_sites: Sites in an average, which counts as public.
        min_noise_shares: Sites that share the noise of a sum, at least; 0 where the coordinator
            adds it.
    """
    if ledger.epsilon == float("inf"):
        return NONE
    rounds, noise = _steps_and_noise(ledger)
    whom, neighbor = "anyone who sees the global adapters", "one site with all its records"
    who = "the coordinator, who sees single updates, adds the noise honestly"
    floats = f", and {FLOATS}"
    if min_noise_shares:
        whom += " or the sums under secure aggregation, the coordinator and any one other site too"
        who = (
            f"sites share the noise honestly, so that {min_noise_shares - 1} shares beside that "
            "one site's "
            "make it whole, no two sites collude, who takes part is public"
        )
        floats = "; the noise is an exact discrete normal, so nothing is assumed of floats"
    return (
        f"Each of {num_sites} sites has {_level(ledger, neighbor)} against {whom}: {rounds} "
        f"rounds, updates clipped to {clipping_norm:g} and noise multiplier {noise} on their sum, "
        f"no credit for drawing sites, {ACCOUNTED}; assumed: {who}, the number of sites is "
        f"public{floats}."
    )


def _level(ledger: Ledger, neighbor: str) -> str:
    level = f"({ledger.epsilon:.2f}, {ledger.delta:g})-differential privacy"
    return f"{level} (adding or removing {neighbor})"


def _steps_and_noise(ledger: Ledger) -> tuple[int, str]:
    noises = sorted({release.noise_multiplier for release in ledger.releases})
    count = sum(release.count for release in ledger.releases)
    return count, " to ".join(f"{noise:.3g}" for noise in dict.fromkeys((noises[0], noises[-1])))


def federation_statement(epsilon: float | None, *, delta: float, clipping_norm: float) -> str:
    """Return the guarantee for each record of a federation whose sites run DP-SGD themselves.

    Args:
        epsilon: Of the site with the weakest guarantee; None where the sites do not tell enough.
        delta: Of all sites.
        clipping_norm: C.
    """
    if epsilon == float("inf"):
        return NONE
    level = "Differential privacy of a level that only the sites know"
    if epsilon is not None:
        level = f"({epsilon:.2f}, {delta:g})-differential privacy (adding or removing one record)"
    return (
        f"{level} holds for each training record against everybody outside its site, the "
        f"coordinator included: sites train by DP-SGD with gradients clipped to {clipping_norm:g}, "
        "account for it in ledgers of their own with dp-accounting's PLD accountant, and refuse "
        "steps beyond the budget; assumed: sites do so, one person's data are one record at one "
        f"site, numbers of records are public, noise and samples stay secret, and {FLOATS}."
    )
