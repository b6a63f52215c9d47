"""What the user says about a federation, and all of a run's settings as one value.

Settings cross process boundaries as Flower's flat run config; every app parses them with the same
parser that reads the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from fedfora.config import ConfigParser, Scalar, flag, to_mapping
from fedfora.data.settings import DataArguments
from fedfora.evaluation.settings import EvalArguments
from fedfora.federated.aggregation import RULES
from fedfora.federated.round_settings import RoundArguments
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.privacy.settings import PrivacyArguments
from fedfora.reporting.settings import RunArguments
from fedfora.training.settings import TrainArguments


@dataclass
class FederationArguments:
    """Who takes part, for how many rounds, and how the updates become one."""

    partition: str = flag(
        "iid", "who gets which rows: iid, by-column:COLUMN, dirichlet:COLUMN:ALPHA"
    )
    num_clients: int | None = flag(None, "how many sites; by-column knows it by itself")
    num_rounds: int = flag(3, "rounds of training and aggregation")
    clients_per_round: int | None = flag(None, "sites drawn for each round; default all")
    local_steps: int = flag(10, "optimizer steps of a site in a round")
    aggregation: str = flag("fedavg", "aggregation rule", choices=list(RULES))
    eval_rounds: int = flag(1, "evaluate every so many rounds, and after the last")

    def __post_init__(self) -> None:
        """Refuse numbers below one, naming the flag."""
        for name in (
            "num_rounds",
            "local_steps",
            "num_clients",
            "clients_per_round",
            "eval_rounds",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


SECTIONS = {
    "run": RunArguments,
    "model": ModelArguments,
    "adapter": AdapterArguments,
    "data": DataArguments,
    "train": TrainArguments,
    "evaluation": EvalArguments,
    "federation": FederationArguments,
    "rounds": RoundArguments,
    "privacy": PrivacyArguments,
}


@dataclass(frozen=True)
class FederationSettings:
    """All settings of a federation."""

    run: RunArguments
    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    train: TrainArguments
    evaluation: EvalArguments
    federation: FederationArguments
    rounds: RoundArguments
    privacy: PrivacyArguments

    def run_config(self) -> dict[str, Scalar]:
        """Return the settings as Flower's run config; `from_run_config` is the inverse."""
        return to_mapping(*(getattr(self, section) for section in SECTIONS))


def from_run_config(run_config: Mapping[str, Scalar]) -> FederationSettings:
    """Parse Flower's run config.

    Raises:
        ConfigError: If a name or a value is wrong.
    """
    return _parsed(tuple(sorted(run_config.items())))


@lru_cache(maxsize=4)  # every message of a run carries the same settings
def _parsed(items: tuple[tuple[str, Scalar], ...]) -> FederationSettings:
    return FederationSettings(*ConfigParser(SECTIONS.values()).parse_mapping(dict(items)))
