"""What there is to see of a federation while it runs."""

import math
from typing import Any

from fedfora.federated.arguments import RoundArguments
from fedfora.federated.coordinator.strategy import RoundWatcher, SiteResult
from fedfora.reporting.record import RunRecord, begin_round, note_sent


class RoundView(RoundWatcher):
    """Whoever watches a federation; this one looks away."""

    def resumed(self, round_number: int) -> None:
        """The run goes on after this round."""

    def absent(self, site: str, reason: str) -> None:
        """A site takes no part in the run."""

    def round_started(self, round_number: int, num_rounds: int, sites: list[str]) -> None:
        """A round begins with these sites."""

    def evaluated(self, num_rows: int) -> None:
        """So many more test rows were answered."""

    def round_finished(
        self,
        round_number: int,
        loss: float | None,
        validation_loss: float | None,
        scores: dict[str, Any],
        aggregation_error: float | None,
    ) -> None:
        """A round is over; `scores` is empty, and the others None, where nothing was told."""

    def lost(self, round_number: int, reason: str) -> None:
        """A round came to nothing; the run goes on from the adapter before it."""

    def waiting(self, round_number: int, reason: str, pause_s: float) -> None:
        """Too few updates came; the round is tried again after a pause."""

    def stopped_early(self, best_round: int) -> None:
        """The run ends, as nothing became better after this round."""


# What became of each site in a round, and whether enough of them are left.


SHOWN = 8


class NoQuorum(ValueError):
    """Too few sites sent a usable update."""


class RoundLog(RoundWatcher):
    """Keeps account of a round, and tells the record and the view as it happens."""

    def __init__(self, record: RunRecord, view: RoundView, rounds: RoundArguments) -> None:
        self.record = record
        self.view = view
        self.rounds = rounds
        self.round_number = 0
        self.drawn: list[str] = []
        self.used: list[SiteResult] = []
        self.refused: list[dict[str, Any]] = []

    def open(self, round_number: int, sampled: list[str]) -> None:
        """Begin a round with these sites."""
        self.round_number, self.drawn = round_number, sampled
        self.used, self.refused = [], []
        begin_round(self.record.directory, round_number, sampled)

    def contributed(self, contribution: SiteResult) -> None:
        """Note an update that was taken in."""
        self.used.append(contribution)
        note_sent(self.record.directory, contribution.site)
        self.view.contributed(contribution)

    def rejected(self, site: str, reason: str) -> None:
        """Note a reply that was left out, and why."""
        self.refused.append({"site": site, "reason": reason})
        self.record.log("rejected", round=self.round_number, site=site, reason=reason)
        self.view.rejected(site, reason)

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
