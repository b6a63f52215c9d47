"""What the user says about secure aggregation, and what else cannot be had together with it."""

from dataclasses import dataclass, fields

from fedfora.config import flag
from fedfora.federated.aggregation import RULES, rules_of
from fedfora.federated.aggregation.means import mean_of_factors
from fedfora.federated.aggregation_settings import AggregationArguments
from fedfora.federated.arguments import RoundArguments
from fedfora.federated.secure_aggregation.graph import MIN_SITES


@dataclass
class SecureAggregationArguments:
    """Whether the coordinator sees single updates, and what the sum of them can hold."""

    secure_aggregation: bool = flag(
        False, "the coordinator learns the sum of the updates and no single one"
    )
    secagg_threshold: float = flag(
        0.66, "share of a round's sites that must last to its end; above a half"
    )
    secagg_min_sites: int | None = flag(
        None,
        "fewest sites of a round that a site takes part with; default: the threshold's share of "
        "all sites",
    )
    secagg_range: float = flag(1.0, "numbers of an update beyond this are clipped, and counted")

    def __post_init__(self) -> None:
        """Refuse numbers out of range, naming the flag."""
        if not 0.5 < self.secagg_threshold <= 1:
            raise ValueError(
                f"--secagg_threshold must be above 0.5 and at most 1, got {self.secagg_threshold}"
            )
        if self.secagg_min_sites is not None and self.secagg_min_sites < MIN_SITES:
            raise ValueError(
                f"--secagg_min_sites must be at least {MIN_SITES}, got {self.secagg_min_sites}"
            )
        if not 0 < self.secagg_range < float("inf"):
            raise ValueError(f"--secagg_range must be above 0, got {self.secagg_range}")


def check_secure(chosen: AggregationArguments, rounds: RoundArguments) -> None:
    """Raise if another flag asks for what only single updates, or numbers in clear, can give.

    Raises:
        ValueError: Naming the flag and the reason.
    """
    with_it = "with --secure_aggregation"
    if not all(rule.aggregate is mean_of_factors for rule in rules_of(chosen.aggregation)):
        possible = [name for name in RULES if RULES[name].aggregate is mean_of_factors]
        raise ValueError(
            f"--aggregation {chosen.aggregation} needs every site's own update; {with_it} there is "
            f"only their sum: use one of {', '.join(possible)}"
        )
    for name, value, only in (
        ("robust", chosen.robust, "none"),
        ("gauge", chosen.gauge, "none"),
        ("update_dtype", chosen.update_dtype, "float32"),
        ("site_ranks", chosen.site_ranks, []),
    ):
        if value != only:
            raise ValueError(
                f"--{name} {value} needs every site's own update; {with_it} there is only their sum"
            )
    if rounds.validation_fraction:
        raise ValueError(
            f"--validation_fraction lets every site send a loss in clear: not {with_it}"
        )
    if rounds.max_norm_ratio not in (0, _default(rounds, "max_norm_ratio")):
        raise ValueError(
            f"--max_norm_ratio compares single updates: not {with_it}; --max_update_norm lets each "
            "site shorten its own"
        )
    if rounds.min_median_cosine is not None:
        raise ValueError(f"--min_median_cosine compares single updates: not {with_it}")
    if chosen.weighting == "rows" and rounds.max_weight is None:
        raise ValueError(f"--weighting rows {with_it} needs --max_weight: the most rows of a site")


def _default(settings: RoundArguments, name: str) -> object:
    return next(field.default for field in fields(settings) if field.name == name)
