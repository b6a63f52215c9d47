"""What there is to see of a federation while it runs."""

from typing import Any

from fedfora.federated.coordinator.strategy import RoundWatcher


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

    def stopped_early(self, best_round: int) -> None:
        """The run ends, as nothing became better after this round."""
