"""What the user says about secure aggregation."""

from dataclasses import dataclass

from fedfora.config import flag


@dataclass
class SecureAggregationArguments:
    """Whether the coordinator sees single updates, and what the sum of them can hold."""

    secure_aggregation: bool = flag(
        False, "the coordinator learns the sum of the updates and no single one"
    )
    secagg_threshold: float = flag(
        0.66, "share of a round's sites that must last to its end; above a half"
    )
    secagg_range: float = flag(1.0, "numbers of an update beyond this are clipped, and counted")

    def __post_init__(self) -> None:
        """Refuse numbers out of range, naming the flag."""
        if not 0.5 < self.secagg_threshold <= 1:
            raise ValueError(
                f"--secagg_threshold must be above 0.5 and at most 1, got {self.secagg_threshold}"
            )
        if not 0 < self.secagg_range < float("inf"):
            raise ValueError(f"--secagg_range must be above 0, got {self.secagg_range}")
