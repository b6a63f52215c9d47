"""What the user says about how updates travel and become one."""

from dataclasses import dataclass

from fedfora.config import flag
from fedfora.federated.aggregation import GAUGES, NAMES, ROBUST
from fedfora.federated.aggregation.server_optimizer import NAMES as SERVER_OPTIMIZERS
from fedfora.federated.wire.formats import FORMATS

WEIGHTINGS = ("tokens", "rows", "equal")


@dataclass
class AggregationArguments:
    """Rule, weights, robustness, server optimizer, travel format."""

    aggregation: str = flag("fedavg", "aggregation rule", choices=NAMES)
    weighting: str = flag(
        "tokens", "a site's weight: tokens trained on, rows it has, or equal", choices=WEIGHTINGS
    )
    robust: str = flag("none", "what to do instead of the mean", choices=["none", *ROBUST])
    num_malicious_nodes: int = flag(1, "sites that trimmed-mean, krum and multi-krum can stand")
    gauge: str = flag(
        "none",
        "rotate factors to a common basis first (fedavg) or after (refactor)",
        choices=["none", *GAUGES],
    )
    warmup_rounds: int = flag(3, "warmup-core: rounds of refactor before cores alone travel")
    refresh_rounds: int = flag(10, "warmup-core: a round of refactor every so many rounds")
    site_ranks: list[int] = flag(
        [], "ranks of the sites in their order, repeated as needed; default --lora_rank for all"
    )
    server_optimizer: str = flag(
        "sgd",
        "what takes the mean change as a gradient; sgd at rate 1 is the mean itself",
        choices=SERVER_OPTIMIZERS,
    )
    server_learning_rate: float = flag(1.0, "learning rate of the server optimizer")
    server_momentum: float = flag(0.9, "momentum: share of the last step that goes on")
    beta_1: float = flag(0.9, "adam, yogi, adagrad: decay of the first moment")
    beta_2: float = flag(0.99, "adam, yogi: decay of the second moment")
    tau: float = flag(1e-3, "adam, yogi, adagrad: the smaller, the more adaptive")
    proximal_mu: float = flag(0.0, "FedProx: pull towards the received adapter; 0 for none")
    update_dtype: str = flag(
        "float32",
        "travel format of a site's update; what it loses is sent later",
        choices=list(FORMATS),
    )

    def __post_init__(self) -> None:
        """Refuse numbers out of range, naming the flag."""
        for name, least in {
            "num_malicious_nodes": 0,
            "warmup_rounds": 1,
            "refresh_rounds": 2,
        }.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        for name in ("server_momentum", "beta_1", "beta_2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {value}")
        for name in ("server_learning_rate", "tau"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"--{name} must be above 0, got {value}")
        if not 0 <= self.proximal_mu < float("inf"):
            raise ValueError(f"--proximal_mu must be at least 0, got {self.proximal_mu}")
        if any(rank < 1 for rank in self.site_ranks):
            raise ValueError(f"--site_ranks must be at least 1, got {self.site_ranks}")
