"""The user's settings of a round: who may be missing, what is refused, what is kept."""

from dataclasses import dataclass

from fedfora.config import Options, flag
from fedfora.federated.aggregation import ROBUST, RULES
from fedfora.federated.aggregation.server_optimizer import NAMES as SERVER_OPTIMIZERS
from fedfora.federated.wire.formats import FORMATS


@dataclass
class RoundArguments(Options):
    """Trackers, deadline, quorum, limits of what a site may send, validation, checkpoints."""

    report_to: list[str] = flag(
        ["none"], "tensorboard, mlflow, wandb, trackio: the coordinator reports every round there"
    )
    round_deadline: float | None = flag(
        None, "seconds a site has for a round; a later one is left out of it", within="(0, inf]"
    )
    start_deadline: float | None = flag(
        None,
        "seconds a site has to load its base and rows; a later one takes no part",
        within="(0, inf]",
    )
    min_clients: int = flag(1, "fewest usable updates for a round to count", least=1)
    quorum_wait: float | None = flag(
        None,
        "seconds for which a round with too few updates is retried before the run stops; "
        "default 0 in a simulation, a day with real sites",
        within="[0, inf]",
    )
    max_norm_ratio: float = flag(
        10.0, "refuse an update longer than this many times the round's median; 0 for no such limit"
    )
    max_update_norm: float | None = flag(
        None, "refuse an update longer than this", within="(0, inf]"
    )
    max_weight: float | None = flag(
        None,
        "refuse a weight above this; default what a site's steps and row lengths allow",
        within="(0, inf]",
    )
    validation_fraction: float = flag(
        0.0,
        "share of its rows that a site holds out to validate each round's received adapter",
        within="[0, 1)",
    )
    early_stopping_patience: int | None = flag(
        None, "stop after this many rounds in a row without a better one", least=1
    )
    save_total_limit: int = flag(
        2, "newest checkpoints to keep; the best round's stays too", "--checkpoints_kept", least=1
    )
    resume: str | None = flag(
        None, "resume the run in this directory, with the settings of its config.yaml", often=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_norm_ratio != 0 and not self.max_norm_ratio >= 1:
            raise ValueError(f"--max_norm_ratio must be 0 or at least 1, got {self.max_norm_ratio}")


# The user's settings for how updates travel and are combined.

WEIGHTINGS = ("tokens", "rows", "equal")


@dataclass
class AggregationArguments(Options):
    """Rule, weights, robustness, server optimizer, travel format."""

    aggregation: str = flag("fedavg", "aggregation rule", choices=sorted(RULES), often=True)
    weighting: str = flag(
        "tokens", "a site's weight: tokens trained on, rows it has, or equal", choices=WEIGHTINGS
    )
    robust: str = flag("none", "robust combination instead of the mean", choices=["none", *ROBUST])
    num_malicious_nodes: int = flag(1, "sites that trimmed-mean and multi-krum withstand", least=0)
    site_ranks: list[int] = flag(
        [],
        "ranks of the sites, in order, repeated as needed; default --lora_rank for all",
        least=1,
    )
    server_optimizer: str = flag(
        "sgd",
        "applied to the mean change as a gradient; sgd at rate 1 is the mean itself",
        choices=SERVER_OPTIMIZERS,
    )
    server_learning_rate: float = flag(1.0, "learning rate of the server optimizer", above=0)
    server_momentum: float = flag(
        0.9, "momentum: share of the last step that is kept", within="[0, 1)"
    )
    beta_1: float = flag(0.9, "adam: decay of the first moment", within="[0, 1)")
    beta_2: float = flag(0.99, "adam: decay of the second moment", within="[0, 1)")
    tau: float = flag(1e-3, "adam: the smaller, the more adaptive", above=0)
    proximal_mu: float = flag(
        0.0, "FedProx: pull towards the received adapter; 0 for none", least=0
    )
    update_dtype: str = flag(
        "float32",
        "travel format of a site's update; what it loses is added to the next one",
        choices=list(FORMATS),
    )
