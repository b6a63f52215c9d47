"""What the user says about a federation, and all of a run's settings as one value.

Settings cross process boundaries as Flower's flat run config; every app parses them with the same
parser that reads the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

from fedfora.config import ConfigParser, Scalar, flag, to_mapping
from fedfora.data.settings import DataArguments
from fedfora.evaluation.settings import EvalArguments
from fedfora.federated.aggregation import RULES, Moment, Rule, rule_of_round, rules_of
from fedfora.federated.aggregation.means import mean_of_factors
from fedfora.federated.arguments import AggregationArguments, RoundArguments
from fedfora.federated.secure_aggregation.messages import MIN_SITES
from fedfora.federated.shared_noise import check_shared
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.privacy.settings import PrivacyArguments
from fedfora.reporting.record import RunArguments
from fedfora.training.settings import TrainArguments, check_record_privacy

ARMS = ("base", "alone", "central")  # what a federation is compared with


@dataclass
class FederationArguments:
    """Who takes part, and for how many rounds."""

    partition: str = flag(
        "iid", "who gets which rows: iid, by-column:COLUMN, dirichlet:COLUMN:ALPHA"
    )
    num_clients: int | None = flag(None, "how many sites; by-column knows it by itself")
    min_rows_per_site: int = flag(
        1, "by-column: sites with fewer rows are joined into one, called 'small sites'"
    )
    compare: list[str] = flag(
        [],
        "besides the federation, score the base, every site alone, central training on all rows: "
        "any of base, alone, central; needs --test_file",
    )
    num_rounds: int = flag(3, "rounds of training and aggregation")
    clients_per_round: int | None = flag(None, "sites drawn for each round; default all")
    local_steps: int = flag(10, "optimizer steps of a site in a round")
    eval_rounds: int = flag(1, "evaluate every so many rounds, and after the last")

    def __post_init__(self) -> None:
        """Refuse numbers below one, naming the flag."""
        for name in (
            "num_rounds",
            "local_steps",
            "min_rows_per_site",
            "num_clients",
            "clients_per_round",
            "eval_rounds",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        for name in self.compare:
            if name not in ARMS:
                raise ValueError(f"--compare {name}: choose from {', '.join(ARMS)}")


# What the user says about secure aggregation, and what else cannot be had together with it.


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


# In the order of `fedfora simulate --help`: what is said most often comes first.
SECTIONS = {
    "run": RunArguments,
    "model": ModelArguments,
    "data": DataArguments,
    "federation": FederationArguments,
    "train": TrainArguments,
    "adapter": AdapterArguments,
    "aggregation": AggregationArguments,
    "rounds": RoundArguments,
    "evaluation": EvalArguments,
    "privacy": PrivacyArguments,
    "secure": SecureAggregationArguments,
}


@dataclass(frozen=True)
class FederationSettings:
    """All settings of a federation."""

    run: RunArguments
    model: ModelArguments
    data: DataArguments
    federation: FederationArguments
    train: TrainArguments
    adapter: AdapterArguments
    aggregation: AggregationArguments
    rounds: RoundArguments
    evaluation: EvalArguments
    privacy: PrivacyArguments
    secure: SecureAggregationArguments

    def __post_init__(self) -> None:
        """Refuse what an aggregation rule cannot honor, naming the flag."""
        check_record_privacy(self.privacy, self.train)
        check_fit(self.aggregation, self.adapter, self.train)
        private = any(not rule.sends for rule in rules_of(self.aggregation.aggregation))
        if private and not (self.rounds.validation_fraction and self.federation.num_rounds > 1):
            raise ValueError(
                "--aggregation personal-core needs --validation_fraction, to judge the private "
                "cores on, and at least 2 rounds: the last one is theirs"
            )
        if self.secure.secure_aggregation:
            check_secure(self.aggregation, self.rounds)
        if self.privacy.privacy_unit != "none" and self.rounds.validation_fraction:
            raise ValueError(
                "--validation_fraction lets every site send a loss without noise: not with "
                f"--privacy_unit {self.privacy.privacy_unit}"
            )
        if self.federation.compare and self.data.test_file is None:
            raise ValueError("--compare scores held-out rows: it needs --test_file")
        if self.rounds.min_median_cosine is not None:
            check_directions(self.aggregation, self.privacy)
        if self.privacy.privacy_unit == "site":
            check_site_privacy(self.aggregation)
            if self.secure.secure_aggregation:
                check_shared(self.aggregation, self.rounds)

    def rule_of_round(self, round_index: int) -> Rule:
        """Return the aggregation rule of a round, counted from 0."""
        chosen = self.aggregation
        moment = Moment(
            round_index=round_index,
            num_rounds=self.federation.num_rounds,
            warmup_rounds=chosen.warmup_rounds,
            refresh_rounds=chosen.refresh_rounds,
        )
        return rule_of_round(chosen.aggregation, moment)

    @property
    def largest_weight(self) -> int:
        """The largest weight that a site can have in a round, under secure aggregation."""
        if self.aggregation.weighting == "equal":
            return 1
        return int(self.rounds.max_weight or self.most_tokens)

    @property
    def most_tokens(self) -> int:
        """The most answer tokens that a site's steps of a round can train on."""
        train = self.train
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
        return self.federation.local_steps * rows * self.data.max_target_length

    def run_config(self) -> dict[str, Scalar]:
        """Return the settings as Flower's run config; `from_run_config` is the inverse."""
        return to_mapping(*(getattr(self, section) for section in SECTIONS))


def check_fit(
    chosen: AggregationArguments, adapter: AdapterArguments, train: TrainArguments
) -> None:
    """Raise if the aggregation rule cannot honor another flag.

    Raises:
        ValueError: Naming both, and a remedy where there is one.
    """
    name, rules = chosen.aggregation, rules_of(chosen.aggregation)
    too_large = [rank for rank in chosen.site_ranks if rank > adapter.lora_rank]
    if too_large:
        raise ValueError(f"--site_ranks {too_large[0]} is above --lora_rank {adapter.lora_rank}")
    if chosen.site_ranks and not all(rule.any_rank for rule in rules):
        raise ValueError(f"--aggregation {name} cannot mix --site_ranks; refactor and stack can")
    if chosen.gauge != "none" and all(rule.gauge == "nothing" for rule in rules):
        raise ValueError(f"--gauge {chosen.gauge} changes nothing under --aggregation {name}")
    plain = chosen.server_optimizer == "sgd" and chosen.server_learning_rate == 1
    if not plain and any(rule.on_top for rule in rules):
        raise ValueError(f"--aggregation {name} takes only --server_optimizer sgd at rate 1")
    if not plain and chosen.gauge != "aligned" and not all(r.keeps_coordinates for r in rules):
        raise ValueError(
            f"--aggregation {name} makes new factors each round; --server_optimizer "
            f"{chosen.server_optimizer} needs --gauge aligned with it"
        )
    if chosen.gauge == "aligned" and chosen.site_ranks:
        raise ValueError("--site_ranks needs factors in order of size: leave out --gauge aligned")
    if train.loraplus_lr_ratio != 1 and any("D" in rule.frozen for rule in rules):
        raise ValueError(f"--aggregation {name} freezes the factor that --loraplus_lr_ratio speeds")


def check_directions(chosen: AggregationArguments, privacy: PrivacyArguments) -> None:
    """Raise where updates have no common directions, or one site may not decide on another.

    Raises:
        ValueError: Naming both flags.
    """
    if chosen.site_ranks:
        raise ValueError("--min_median_cosine compares updates of one shape: not with --site_ranks")
    if privacy.privacy_unit == "site":
        raise ValueError(
            "--min_median_cosine lets one site decide whether another one counts: not with "
            "--privacy_unit site"
        )


def from_run_config(run_config: Mapping[str, Scalar]) -> FederationSettings:
    """Parse Flower's run config.

    Raises:
        ConfigError: If a name or a value is wrong.
    """
    return _parsed(tuple(sorted(run_config.items())))


@lru_cache(maxsize=4)  # every message of a run carries the same settings
def _parsed(items: tuple[tuple[str, Scalar], ...]) -> FederationSettings:
    return FederationSettings(*ConfigParser(SECTIONS.values()).parse_mapping(dict(items)))


def check_site_privacy(chosen: AggregationArguments) -> None:
    """Raise unless one site's change moves the result by its clipped length and no more.

    Raises:
        ValueError: Naming the flag and the reason.
    """
    with_it = "with --privacy_unit site"
    possible = [name for name in RULES if RULES[name].aggregate is mean_of_factors]
    if not all(rule.aggregate is mean_of_factors for rule in rules_of(chosen.aggregation)):
        raise ValueError(
            f"--aggregation {chosen.aggregation} is no mean of clipped changes: {with_it} use one "
            f"of {', '.join(possible)}"
        )
    for name, only in (("robust", "none"), ("gauge", "none"), ("site_ranks", [])):
        if getattr(chosen, name) != only:
            raise ValueError(f"--{name} {getattr(chosen, name)}: {with_it} only the mean")
