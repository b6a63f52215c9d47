"""Differential privacy of whole sites, with noise from the coordinator or shared among the sites.

DP-FedAvg (McMahan et al. 2018, https://arxiv.org/abs/1710.06963): each site's change, cut to C,
enters a sum; the sum is divided by the number n of sites that were asked, which is public, not by
the number that answered; every number gets normal noise of standard deviation z C / n. What the
server optimizer makes of it costs nothing more. Every round is counted as if all sites took part.

Under secure aggregation the sites clip and add the noise (see `shared_noise`), and this module
only keeps the account.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedfora.federated.aggregation.update import AdapterState, Weighted
from fedfora.federated.settings import FederationSettings
from fedfora.privacy.accounting import Release, epsilon_of
from fedfora.privacy.clipping import SecretNoise, add_noise, clip
from fedfora.privacy.ledger import Ledger, federation_statement, site_statement
from fedfora.privacy.settings import PrivacyArguments, noise_of


@dataclass
class SitePrivacy:
    """Clips the sites' changes, and adds noise to their mean.

    Args:
        noise_multiplier: z.
        clipping_norm: C.
        num_sites: Sites that are asked in a round.
        ledger: What the rounds have spent.
        min_noise_shares: Sites whose shares of the noise are in every sum, where sites add it
            themselves under secure aggregation; 0 where the coordinator does.
        run: What the ledger calls this run.
        planned: Rounds that the budget must last for, where it chooses the coordinator's noise; 0
            where the noise is stated or shared.
    """

    noise_multiplier: float
    clipping_norm: float
    num_sites: int
    ledger: Ledger
    min_noise_shares: int = 0
    run: str = ""
    planned: int = 0
    noise: SecretNoise = field(default_factory=SecretNoise)
    _answers: int = 0

    def begin(self, round_number: int) -> None:
        """Pay for a round; one that is repeated is paid again.

        Raises:
            BudgetSpent: If the round would exceed the budget; it must not be run.
        """
        if self.planned:  # rounds that were repeated leave less for the others: more noise
            left = max(1, self.planned - round_number + 1)
            self.noise_multiplier = self.ledger.noise_for(1.0, planned=self.planned, left=left)
        settings = {"round": round_number, "clipping_norm": self.clipping_norm}
        self.ledger.spend(Release(1.0, self.noise_multiplier, 1), run=self.run, settings=settings)

    def clipped(self, current: AdapterState, updates: Iterable[Weighted]) -> Iterator[Weighted]:
        """Yield the sites' updates with their change cut to C, all with the same weight."""
        self._answers = 0
        for update, _ in updates:
            self._answers += 1
            change = clip({n: update[n] - current[n] for n in current}, self.clipping_norm)
            yield {name: current[name] + change[name] for name in current}, 1.0

    def noisy(self, current: AdapterState, mean: AdapterState) -> AdapterState:
        """Return the sum of the changes over n, with noise, from the mean of those that arrived."""
        share = self._answers / self.num_sites
        std = self.noise_multiplier * self.clipping_norm if self.noise_multiplier else 0.0
        change = {name: (mean[name] - current[name]) * share for name in current}
        noisy = add_noise(change, std / self.num_sites, self.noise)
        return {name: current[name] + noisy[name] for name in current}

    def event(self) -> dict[str, float | str | None]:
        """Return what the run's record says after a round, with the guarantee in a sentence."""
        statement = site_statement(
            self.ledger,
            clipping_norm=self.clipping_norm,
            num_sites=self.num_sites,
            min_noise_shares=self.min_noise_shares,
        )
        return _event(self.ledger.epsilon, self.ledger.delta, statement)


def site_privacy_of(
    arguments: PrivacyArguments,
    ledger: Ledger,
    *,
    num_sites: int,
    num_rounds: int,
    min_noise_shares: int = 0,
    run: str = "",
) -> SitePrivacy | None:
    """Return what the user asks for; None if sites are not to be hidden."""
    if arguments.privacy_unit != "site":
        return None
    noise_multiplier = noise_of(arguments, count=num_rounds)
    planned = num_rounds if arguments.noise_multiplier is None and not min_noise_shares else 0
    return SitePrivacy(
        noise_multiplier, arguments.clipping_norm, num_sites, ledger, min_noise_shares, run, planned
    )


def sites_ledger(settings: FederationSettings, names: Iterable[str]) -> str:
    """Return the name of the ledger of some sites: the same for the same sites in every run."""
    file = settings.data.train_file
    if file is not None and Path(file).exists():  # however it is spelled, and from wherever
        file = str(Path(file).resolve())
    known = (file, settings.data.dataset, sorted(names))
    return f"sites-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}"


def record_event(
    arguments: PrivacyArguments,
    site_rows: Iterable[int],
    *,
    rate_of: Callable[[int], float],
    total_steps: int,
    min_noise_shares: int = 0,
) -> dict[str, float | str | None]:
    """Return what the run's record says if each site hides its own records.

    The coordinator knows the plan and how many rows the sites have: enough for the worst of them.

    Args:
        arguments: Budget or noise multiplier.
        site_rows: Rows of each site; 0 where a site does not tell.
        rate_of: From a site's rows to the probability with which each is in a step's sample.
        total_steps: Steps that a site takes in the whole run.
        min_noise_shares: Sites that share the noise of a step, at least; 0 where none do.
    """
    epsilon, noise, rows = arguments.target_epsilon, arguments.noise_multiplier, list(site_rows)
    if noise is not None and min_noise_shares:  # one rate for all sites, however many rows
        epsilon = epsilon_of([Release(rate_of(1), noise, total_steps)], arguments.target_delta)
    elif noise is not None and all(rows):
        spent = [
            epsilon_of([Release(rate_of(n), noise, total_steps)], arguments.target_delta)
            for n in set(rows)
        ]
        epsilon = min(max(spent), math.inf if epsilon is None else epsilon)
    statement = federation_statement(
        epsilon,
        delta=arguments.target_delta,
        clipping_norm=arguments.clipping_norm,
        min_noise_shares=min_noise_shares,
    )
    return _event(epsilon, arguments.target_delta, statement)


def _event(epsilon: float | None, delta: float, statement: str) -> dict[str, float | str | None]:
    finite = epsilon is not None and math.isfinite(epsilon)
    return {"epsilon": epsilon if finite else None, "delta": delta, "privacy_statement": statement}
