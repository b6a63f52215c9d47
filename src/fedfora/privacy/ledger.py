"""When to stop, and what to say then: a ledger of what was released, and its sentence.

The ledger lists releases; epsilon is always computed from the whole list, so it composes over
steps, rounds, resumed runs and trials. Every attempt is entered, and synced to the disk, before it
begins: what was killed may have been seen, and what is repeated is a second release with fresh
noise. Nothing is ever taken back, and nothing is repeated for free.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedfora.files import write_atomically
from fedfora.privacy.accounting import (
    SEARCH_GRID,
    Release,
    epsilon_of,
    noise_multiplier_for,
    replace_one_epsilon_of,
)
from fedfora.privacy.settings import PRIVACY_DIR, PrivacyArguments
from fedfora.registry import counted

LOCK_S = 60.0  # another process holds a ledger for milliseconds
MOST_NOISE = 4.0  # times what the plan alone needs: if more is needed, the budget is spent


class BudgetSpent(ValueError):
    """A release would exceed the budget; nothing was released."""


@dataclass(frozen=True)
class Line:
    """A line of a ledger: a release, who made it, and its settings beyond noise and sampling."""

    release: Release
    run: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the line flat, as it is written to disk."""
        return {**asdict(self.release), "run": self.run, "settings": dict(self.settings)}


@dataclass
class Ledger:
    """What has been released about one site's records (or about the sites), and the budget.

    Args:
        delta: The probability delta of (epsilon, delta)-differential privacy.
        target_epsilon: The budget; None keeps the account and refuses nothing.
        path: Where the ledger is; None keeps it in memory.
        lines: What was released, and by which run.
    """

    delta: float
    target_epsilon: float | None = None
    path: Path | None = None
    lines: list[Line] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, *, delta: float, target_epsilon: float | None) -> "Ledger":
        """Return the ledger at `path` under a budget; an empty one if there is no file.

        Raises:
            ValueError: If the file is no ledger, or that of other data: privacy is not spent on a
                guess.
        """
        return cls(delta, target_epsilon, lines=_read(path), path=path.resolve())

    @property
    def releases(self) -> list[Release]:
        """What was released, in order."""
        return [line.release for line in self.lines]

    @property
    def runs(self) -> list[str]:
        """The runs that released something, in order."""
        return list(dict.fromkeys(line.run for line in self.lines))

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
        if not after <= self.target_epsilon:
            raise BudgetSpent(
                f"the privacy budget does not allow {counted(release.count, 'more step')}: epsilon "
                f"would be {after:.3f}, --target_epsilon is {self.target_epsilon:g} and "
                f"{self.epsilon:.3f} is spent{self._by_whom()}; such steps left: "
                f"{self.left(release)}"
            )

    def spend(
        self, release: Release, *, run: str = "", settings: Mapping[str, Any] | None = None
    ) -> None:
        """Enter a release, on disk too, before it happens.

        The file is locked and read again first: two processes do not spend the same budget.

        Raises:
            BudgetSpent: If it would exceed the budget; then nothing is entered.
            ValueError: If another process holds the ledger; then nothing is entered.
        """
        with self._locked():
            self.check(release)
            line = Line(release, run, settings or {})
            last = self.lines[-1] if self.lines else None
            if last is not None and last == replace(
                line, release=replace(release, count=last.release.count)
            ):
                together = replace(release, count=last.release.count + release.count)
                self.lines[-1] = replace(line, release=together)
            else:
                self.lines.append(line)
            if self.path is not None:
                text = json.dumps(self.as_json(), indent=2) + "\n"
                write_atomically(self.path, text, durable=True)

    def left(self, release: Release) -> int:
        """Return how many of the release's steps still fit into the budget."""
        fits, too_many = 0, release.count
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            some = replace(release, count=middle)
            within = epsilon_of([*self.releases, some], self.delta) <= (self.target_epsilon or 0)
            fits, too_many = (middle, too_many) if within else (fits, middle)
        return fits

    def noise_for(self, sampling_rate: float, *, planned: int, left: int) -> float:
        """Return the noise multiplier with which the remaining steps stay within the budget.

        It is the one that the plan alone needs, unless the ledger holds more than the plan's
        earlier steps: steps that were repeated after a crash, or another run. Then it is larger.

        Args:
            sampling_rate: Of every step.
            planned: Steps of the whole plan.
            left: Steps of it that remain.

        Raises:
            BudgetSpent: If the steps would need more than `MOST_NOISE` times the plan's noise.
        """
        assert self.target_epsilon is not None
        alone = noise_multiplier_for(
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            sampling_rate=sampling_rate,
            count=planned,
        )

        def fits(noise_multiplier: float) -> bool:
            releases = [*self.releases, Release(sampling_rate, noise_multiplier, left)]
            spent = epsilon_of(releases, self.delta, grid=SEARCH_GRID)
            return spent <= (self.target_epsilon or 0)

        latest = self.lines[-1].release.noise_multiplier if self.lines else alone
        for tried in (alone, latest):  # the latest may have been chosen for the same rest
            if alone <= tried <= MOST_NOISE * alone and fits(tried):
                return tried
        too_little, enough = alone, MOST_NOISE * alone
        if not fits(enough):
            self.check(Release(sampling_rate, alone, left))
            return alone  # the search's coarser grid counts a little too much
        while enough - too_little > 1e-2 * enough:
            middle = (enough + too_little) / 2
            too_little, enough = (too_little, middle) if fits(middle) else (middle, enough)
        return enough

    def as_json(self) -> dict[str, Any]:
        """Return what is written to disk."""
        return {
            "of": None if self.path is None else self.path.stem,
            "delta": self.delta,
            "target_epsilon": self.target_epsilon,
            "epsilon": self.epsilon if self.epsilon != float("inf") else None,
            "releases": [line.as_json() for line in self.lines],
        }

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file, with what other processes have entered by now."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=LOCK_S)
        try:
            with lock:
                self.lines = _read(self.path)
                yield
        except Timeout as error:
            raise ValueError(
                f"the privacy ledger {self.path} is held by another process; nothing was spent"
            ) from error

    def _by_whom(self) -> str:
        if self.path is None:
            return " in this run"
        runs = [run for run in self.runs if run]
        by = f" by {', '.join(runs[:3])}{' and others' if len(runs) > 3 else ''}" if runs else ""
        return f"{by} (ledger {self.path}; --privacy_dir names another place)"


def _read(path: Path) -> list[Line]:
    """Return the lines of a ledger; none if there is no file."""
    if not path.exists() and not path.is_symlink():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (of := content.get("of", path.stem)) != path.stem:
            raise ValueError(f"it is the ledger of other data, {of}; move it back to {of}.json")
        return [_line(**line) for line in content["releases"]]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a privacy ledger for these data; nothing was spent: {error}"
        ) from error


def _line(*, run: str = "", settings: Mapping[str, Any] | None = None, **release: Any) -> Line:
    """Return a line as `Line.as_json` wrote it; raise if it says what this version cannot count."""
    return Line(Release(**release), run, settings or {})


def open_ledger(arguments: PrivacyArguments, name: str) -> Ledger:
    """Return a ledger with what all runs have spent, wherever their output directories are."""
    return Ledger.open(
        ledger_directory(arguments) / f"{name}.json",
        delta=arguments.target_delta,
        target_epsilon=arguments.target_epsilon,
    )


def ledger_directory(arguments: PrivacyArguments) -> Path:
    """Return where ledgers are: by the flag, the environment or the user's data directory."""
    if named := arguments.privacy_dir or os.environ.get(PRIVACY_DIR):
        return Path(named)
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "fedfora" / "privacy"


# The differential privacy that was given, in one sentence with its assumptions.

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
    steps, noise = _times_and_noise(ledger, "step")
    return (
        f"Each of the {num_rows:,} training records has {_level(ledger, 'one record')} against "
        f"anyone who sees every gradient step on them: {steps} of DP-SGD "
        f"with Poisson sampling, gradients clipped to {clipping_norm:g} and noise multiplier "
        f"{noise}, {ACCOUNTED}; assumed: one person's data are one record, the number of records "
        f"is public, noise and samples stay secret, {FLOATS}, and the files under `local` stay "
        "there."
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
    rounds, noise = _times_and_noise(ledger, "round")
    whom = "anyone who sees the global adapters and the coordinator's record"
    who = "the coordinator, who sees single updates, adds the noise honestly"
    floats = f", and {FLOATS}"
    if min_noise_shares:
        whom += " or the sums under secure aggregation, the coordinator and any one other site too"
        who = (
            f"sites share the noise honestly, so that {min_noise_shares - 1} shares beside that "
            "one site's make it whole, no two sites collude, who takes part is public"
        )
        floats = "; the noise is an exact discrete normal, so nothing is assumed of floats"
    return (
        f"Each of {counted(num_sites, 'site')} has {_level(ledger, 'one site')} against {whom}: "
        f"{rounds}, updates clipped to {clipping_norm:g} and noise multiplier {noise} on their "
        f"sum, no credit for drawing sites, {ACCOUNTED}; assumed: {who}, the number of sites is "
        f"public{floats}."
    )


def _level(ledger: Ledger, neighbor: str) -> str:
    level = f"({ledger.epsilon:.2f}, {ledger.delta:g})-differential privacy"
    other = replace_one_epsilon_of(ledger.releases, ledger.delta)
    return (
        f"{level} ({neighbor} replaced by an empty one; by any other one, epsilon is {other:.2f})"
    )


def _times_and_noise(ledger: Ledger, noun: str) -> tuple[str, str]:
    noises = sorted({release.noise_multiplier for release in ledger.releases})
    count = sum(release.count for release in ledger.releases)
    noise = " to ".join(f"{noise:.3g}" for noise in dict.fromkeys((noises[0], noises[-1])))
    runs = [Path(run).name or "unnamed" for run in ledger.runs]
    where = f" in {len(runs)} runs ({', '.join(runs)})" if len(runs) > 1 else ""
    return counted(count, noun) + where, noise


def federation_statement(
    epsilon: float | None, *, delta: float, clipping_norm: float, min_noise_shares: int = 0
) -> str:
    """Return the guarantee for each record of a federation whose sites run DP-SGD themselves.

    Args:
        epsilon: Of the site with the weakest guarantee; None where the sites do not tell enough.
        delta: Of all sites.
        clipping_norm: C.
        min_noise_shares: Sites that share the noise of a step's sum, at least; 0 where each site
            adds noise of its own.
    """
    if epsilon == float("inf"):
        return NONE
    level = "Differential privacy of a level that only the sites know"
    if epsilon is not None:
        level = (
            f"({epsilon:.2f}, {delta:g})-differential privacy (one record replaced by an empty one)"
        )
    if min_noise_shares:
        return (
            f"{level} holds in this run for each training record against everybody outside its "
            "site who sees the sums under secure aggregation, the coordinator and any one other "
            f"site included: sites sum gradients clipped to {clipping_norm:g}, each adds a share "
            "of the noise before it masks, and each accounts for the whole in a ledger of its own "
            "with dp-accounting's PLD accountant; assumed: sites do so honestly, so that "
            f"{min_noise_shares - 1} shares beside that one site's make the noise whole, no two "
            "sites collude, one person's data are one record at one site, who takes part is "
            "public, noise and samples stay secret; the noise is an exact discrete normal, and "
            "gradients are as good as computed in real numbers."
        )
    return (
        f"{level} holds in this run for each training record against everybody outside its site, "
        "the coordinator included: sites train by DP-SGD with gradients clipped to "
        f"{clipping_norm:g}, account for it in ledgers of their own with dp-accounting's PLD "
        "accountant, and refuse steps beyond the budget; assumed: sites do so, one person's data "
        "are one record at one site, numbers of records are public, noise and samples stay "
        f"secret, and {FLOATS}."
    )
