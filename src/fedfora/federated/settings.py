"""The user's settings for a federation, and all of a run's settings as one value.

Settings cross process boundaries as Flower's flat run config; every app parses them with the same
parser that reads the command line.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import get_type_hints

from fedfora.config import ConfigError, ConfigParser, Options, Scalar, flag, to_mapping
from fedfora.data.settings import DataArguments
from fedfora.evaluation.settings import EvalArguments
from fedfora.federated.aggregation import RULES, Rule
from fedfora.federated.arguments import AggregationArguments, RoundArguments
from fedfora.federated.secure_aggregation.fixed_point import FixedPoint
from fedfora.federated.secure_aggregation.messages import MIN_SITES
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.privacy.settings import PrivacyArguments
from fedfora.registry import unknown
from fedfora.reporting.record import RunArguments
from fedfora.training.settings import TrainArguments, check_record_privacy, fill_in

ARMS = ("base", "alone", "central")  # what a federation is compared with


@dataclass
class FederationArguments(Options):
    """Sites, rounds, and what the federation is compared with."""

    partition: str = flag(
        "iid", "who gets which rows: iid, by-column:COLUMN, dirichlet:COLUMN:ALPHA", often=True
    )
    num_clients: int | None = flag(
        None, "number of sites; by-column finds it by itself", often=True, least=1
    )
    min_rows_per_site: int = flag(
        1, "by-column: sites with fewer rows are merged into one, 'small sites'", least=1
    )
    compare: list[str] = flag(
        [],
        "besides the federation, also score the base, every site alone, or central training: "
        "any of base, alone, central; needs --test_file",
        often=True,
    )
    num_rounds: int = flag(3, "rounds of training and aggregation", often=True, least=1)
    clients_per_round: int | None = flag(None, "sites sampled for each round; default all", least=1)
    local_steps: int = flag(10, "optimizer steps of a site in a round", often=True, least=1)
    eval_rounds: int = flag(1, "evaluate every N rounds, and after the last", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in set(self.compare) - set(ARMS):
            raise ValueError(f"--compare: {unknown('arm', name, ARMS)}")

    @property
    def total_steps(self) -> int:
        """Optimizer steps that a site takes in all rounds."""
        return self.num_rounds * self.local_steps


# The user's settings for secure aggregation, and what cannot be combined with it.


@dataclass
class SecureAggregationArguments(Options):
    """Secure aggregation: its use, and the range of the summed numbers."""

    secure_aggregation: bool = flag(
        False, "the coordinator learns the sum of the updates, but no single one", often=True
    )
    secagg_threshold: float = flag(
        0.66, "share of a round's sites that must last to its end; over half", within="(0.5, 1]"
    )
    secagg_min_sites: int | None = flag(
        None,
        "fewest sites of a round in which a site takes part; default: the threshold's share of "
        "all sites",
        least=MIN_SITES,
    )
    secagg_range: float = flag(
        1.0, "numbers of an update beyond this are clipped, and counted", above=0
    )


# Options of the sections that a federation's sites never read.
NO_EFFECT = frozenset(
    {
        *("num_train_epochs", "max_steps", "logging_steps"),
        *("preprocessing_num_workers", "overwrite_cache"),
    }
)


def settings_parser(description: str | None = None) -> ConfigParser:
    """Return the parser for a federation's options."""
    return ConfigParser(
        SECTIONS.values(), prog="fedfora simulate", description=description, without=NO_EFFECT
    )


@dataclass(frozen=True)
class FederationSettings:
    """All settings of a federation, in the order of `fedfora simulate --help`."""

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
        fill_in(self.train, self.privacy, passes=False)
        check_record_privacy(self.privacy, self.train, self.model)
        for excluded in (_of_the_rule, _of_secure_aggregation, _of_privacy):
            for message in excluded(self):
                raise ConfigError(message)
        if self.federation.compare and self.data.test_file is None:
            raise ConfigError("--compare scores held-out rows: it needs --test_file")

    @property
    def rule(self) -> Rule:
        """The aggregation rule."""
        return RULES[self.aggregation.aggregation]

    @property
    def hides_sites(self) -> bool:
        """Whether the record must tell nothing of a single site but that it was there."""
        return self.privacy.privacy_unit == "site"

    @property
    def shares_noise(self) -> bool:
        """Whether each site adds a share of the noise before it masks."""
        return self.secure.secure_aggregation and (self.hides_sites or self.privacy.shared_noise)

    @property
    def largest_weight(self) -> int:
        """The largest weight that a site can have in a round, under secure aggregation."""
        if self.aggregation.weighting == "equal":
            return 1
        return int(self.rounds.max_weight or self.most_tokens())

    def fixed_point(self, num_sites: int) -> FixedPoint:
        """Return how the numbers of a round with so many sites travel under secure aggregation."""
        return FixedPoint(self.secure.secagg_range, num_sites, self.largest_weight)

    def most_tokens(self, most_rows: float = math.inf) -> float:
        """Return the most answer tokens that a round's steps can train on, of at most so many rows.

        With record privacy, rows stand for tokens; without a batch a step takes a share of them.
        """
        if self.privacy.privacy_unit == "record" and not self.train.names_batch:
            return self.federation.local_steps * most_rows
        return self.federation.local_steps * self.train.rows_per_step * self.data.max_target_length

    def run_config(self) -> dict[str, Scalar]:
        """Return the settings as Flower's run config; `from_run_config` is the inverse."""
        return to_mapping(*(getattr(self, section) for section in SECTIONS))


SECTIONS: dict[str, type] = get_type_hints(FederationSettings)


def from_run_config(run_config: Mapping[str, Scalar]) -> FederationSettings:
    """Parse Flower's run config.

    Raises:
        ConfigError: If a name or a value is wrong.
    """
    return _parsed(tuple(sorted(run_config.items())))


@lru_cache(maxsize=4)  # every message of a run carries the same settings
def _parsed(items: tuple[tuple[str, Scalar], ...]) -> FederationSettings:
    return FederationSettings(*settings_parser().parse_mapping(dict(items)))


def weight_of(settings: FederationSettings, answer_tokens: int, rows: int) -> int:
    """Return a site's weight in a round by `--weighting`: tokens trained on, rows, or 1."""
    return {"tokens": answer_tokens, "rows": rows, "equal": 1}[settings.aggregation.weighting]


# What excludes what: each function yields the message of every broken rule. A new exclusion is one
# `if` in one of them.


def _of_the_rule(s: FederationSettings) -> Iterator[str]:
    """What an aggregation rule cannot honor."""
    chosen, rule = s.aggregation, s.rule
    name, highest = f"--aggregation {rule.name}", max(chosen.site_ranks, default=0)
    if highest > s.adapter.lora_rank:
        yield f"--site_ranks {highest} is above --lora_rank {s.adapter.lora_rank}"
    if chosen.site_ranks and rule.mean_of == "factors":
        yield f"{name} cannot mix --site_ranks; refactor can"
    if not _is_plain(chosen) and rule.mean_of == "products":
        yield f"{name} makes new factors each round and takes only --server_optimizer sgd at rate 1"


def _of_secure_aggregation(s: FederationSettings) -> Iterator[str]:
    """What needs single updates, or numbers in the clear."""
    if not s.secure.secure_aggregation:
        return
    chosen, rounds, with_it = s.aggregation, s.rounds, "with --secure_aggregation"
    own = f"needs every site's own update; {with_it} there is only their sum"
    if s.rule.mean_of != "factors":
        yield f"--aggregation {s.rule.name} {own}: use one of {_means()}"
    if chosen.robust != "none":
        yield f"--robust {chosen.robust} {own}"
    if chosen.update_dtype != "float32":
        yield f"--update_dtype {chosen.update_dtype} {own}"
    if rounds.validation_fraction > 0:
        yield f"--validation_fraction lets every site send a loss in the clear: not {with_it}"
    if rounds.max_norm_ratio not in (0, RoundArguments.max_norm_ratio):
        yield (
            f"--max_norm_ratio compares single updates: not {with_it}; --max_update_norm lets each "
            "site shorten its own"
        )
    if chosen.weighting == "rows" and rounds.max_weight is None:
        yield f"--weighting rows {with_it} needs --max_weight: the most rows of a site"
    if chosen.weighting == "tokens" and s.most_tokens() == math.inf and not rounds.max_weight:
        yield (
            f"--weighting tokens {with_it} and samples that are a share of a site's rows needs "
            "--max_weight, or --weighting equal"
        )


def _of_privacy(s: FederationSettings) -> Iterator[str]:
    """What would reveal more than the noise hides: a site may move the mean only by its length."""
    yield from _of_shared_record_noise(s)
    chosen, rounds, unit = s.aggregation, s.rounds, s.privacy.privacy_unit
    if unit != "none" and rounds.validation_fraction > 0:
        yield (
            "--validation_fraction lets every site send a loss without noise: not with "
            f"--privacy_unit {unit}"
        )
    if unit != "none" and (arms := sorted({*s.federation.compare} - {"base"})):
        yield (
            f"--compare {' '.join(arms)} trains on the same rows without noise, for the same "
            f"record: not with --privacy_unit {unit}"
        )
    if unit != "site":
        return
    with_it = "with --privacy_unit site"
    if s.rule.mean_of != "factors":
        name = f"--aggregation {s.rule.name}"
        yield f"{name} is not a mean of clipped changes: {with_it} use one of {_means()}"
    if chosen.robust != "none":
        yield f"--robust {chosen.robust}: {with_it} only the mean is possible"
    if norm := rounds.max_update_norm:  # who was refused for it would stand in the record
        yield f"--max_update_norm {norm}: {with_it} --clipping_norm shortens updates"
    if s.secure.secure_aggregation and chosen.weighting != "equal":
        told = "reveals how much a site has trained on"
        with_both = f"{with_it} and --secure_aggregation"
        yield f"--weighting {chosen.weighting} {told}: {with_both} use equal"


def _of_shared_record_noise(s: FederationSettings) -> Iterator[str]:
    """What a round of one step, whose gradient is a sum over all sites, cannot honor."""
    if not s.privacy.shared_noise:
        return
    chosen, train, with_it = s.aggregation, s.train, "with --shared_noise"
    if not s.secure.secure_aggregation:
        hides = "a site's own part of the noise hides nothing"
        yield f"--secure_aggregation is missing: {with_it} {hides}"
    if (steps := s.federation.local_steps) != 1:
        yield f"--local_steps {steps}: {with_it} a round is one step; use --local_steps 1"
    if train.names_batch:
        yield f"{with_it} all sites sample the same share of their rows: --sampling_rate, no batch"
    if chosen.aggregation != "fedavg":
        yield f"--aggregation {chosen.aggregation}: {with_it} use fedavg"
    if chosen.weighting != "equal":
        yield f"--weighting {chosen.weighting}: {with_it} use equal"
    if not _is_plain(chosen) or "adamw_torch" not in train.optim or train.weight_decay != 0:
        adam = "takes Adam's steps at --learning_rate; no other optimizer works"
        yield f"{with_it} the coordinator {adam}"
    if chosen.proximal_mu:
        yield f"--proximal_mu {chosen.proximal_mu}: {with_it} sites take no steps"
    if s.rounds.max_update_norm:
        yield f"--max_update_norm: {with_it} each record is clipped instead"


def _is_plain(chosen: AggregationArguments) -> bool:
    """Whether the aggregate itself replaces the global adapter."""
    return chosen.server_optimizer == "sgd" and chosen.server_learning_rate == 1


def _means() -> str:
    """Return which rules are plain means."""
    return ", ".join(name for name in sorted(RULES) if RULES[name].mean_of == "factors")
