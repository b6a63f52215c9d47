"""What became of each site in a round, and whether enough of them are left."""

import math
from typing import Any

from fedfora.federated.arguments import RoundArguments
from fedfora.federated.coordinator.strategy import SiteResult
from fedfora.reporting.record import RunRecord

SHOWN = 8


class NoQuorum(ValueError):
    """Too few sites sent a usable update."""


class RoundLog:
    """Keeps account of a round, and tells the record as it happens.

    Args:
        record: Of the run.
        rounds: How many sites are needed.
        hides_loss: Whether a site's loss must not be told.
    """

    def __init__(self, record: RunRecord, rounds: RoundArguments, *, hides_loss: bool) -> None:
        self.record, self.hides_loss = record, hides_loss
        self.rounds = rounds
        self.round_number = 0
        self.drawn: list[str] = []
        self.used: list[SiteResult] = []
        self.refused: list[dict[str, Any]] = []

    def open(self, round_number: int, num_rounds: int, sampled: list[str]) -> None:
        """Begin a round with these sites."""
        self.round_number, self.drawn = round_number, sampled
        self.used, self.refused = [], []
        self.record.announce(
            "round_started", round=round_number, num_rounds=num_rounds, sites=sampled
        )

    def contributed(self, contribution: SiteResult) -> None:
        """Note an update that was taken in."""
        self.used.append(contribution)
        report = contribution.report
        known = {} if report is None else {"steps": report.steps, "loss": report.loss}
        if self.hides_loss:
            known.pop("loss", None)
        self.record.announce("site_sent", site=contribution.site, **known)

    def rejected(self, site: str, reason: str) -> None:
        """Note a reply that was left out, and why."""
        self.refused.append({"site": site, "reason": reason})
        self.record.log("rejected", round=self.round_number, site=site, reason=reason)

    def check_quorum(self) -> None:
        """Raise unless enough updates were taken in.

        Raises:
            NoQuorum: Naming the sites that are missing, and why.
        """
        rounds, used, num_sampled = self.rounds, len(self.used), len(self.drawn)
        needed = max(1, rounds.min_clients, math.ceil(rounds.min_client_fraction * num_sampled))
        if used >= needed:
            return
        have = f"only {used} of {num_sampled} sites" if used else "no site"
        reasons = [f"{entry['site']}: {entry['reason']}" for entry in self.refused[:SHOWN]]
        more = f"; and {len(self.refused) - SHOWN} more" if len(self.refused) > SHOWN else ""
        raise NoQuorum(
            f"round {self.round_number}: {have} sent a usable update, {needed} needed "
            f"(--min_clients, --min_client_fraction): {'; '.join(reasons)}{more}"
        )
