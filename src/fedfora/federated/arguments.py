"""What the user says about a round: who may be missing, what is refused, what is kept."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from fedfora.config import flag


@dataclass
class RoundArguments:
    """Engine, deadline, quorum, limits of what a site may send, validation, checkpoints."""

    engine: Literal["embedded", "ray", "deploy"] = flag(
        "embedded",
        "embedded: one process, one base; ray: Flower's simulation, several processes; deploy: "
        "real sites, which other commands run",
    )
    round_deadline: float | None = flag(
        None, "seconds a site has for a round; who is later is left out of it"
    )
    start_deadline: float | None = flag(
        None, "seconds a site has to load its base and rows; who is later takes no part"
    )
    min_clients: int = flag(1, "a round with fewer usable updates stops the run")
    min_client_fraction: float = flag(0.0, "the same as a share of the sites drawn for the round")
    max_norm_ratio: float = flag(
        10.0, "refuse an update longer than so many times the round's median; 0 for no such limit"
    )
    min_median_cosine: float | None = flag(
        None,
        "refuse an update whose cosine to the median of the round's updates is below this; "
        "-1 only records the cosines",
    )
    max_update_norm: float | None = flag(None, "refuse an update longer than this")
    max_weight: float | None = flag(
        None, "refuse a weight above this; default what a site's steps and row lengths allow"
    )
    validation_fraction: float = flag(
        0.0, "share of its rows a site keeps back, to judge each round's received adapter on"
    )
    early_stopping_patience: int | None = flag(
        None, "stop after so many rounds in a row without a better one"
    )
    save_total_limit: int = flag(
        2, "newest checkpoints to keep; the best round's stays too", "--checkpoints_kept"
    )
    resume: str | None = flag(
        None, "go on with the run in this directory, with the settings of its config.yaml"
    )

    def __post_init__(self) -> None:
        """Refuse numbers out of range, naming the flag."""
        if self.engine == "deploy":
            raise ValueError(
                "--engine deploy: real sites need kits. `fedfora provision sites.yaml` makes them; "
                "then `fedfora site` at each site, and `fedfora coordinator run` (or `flwr run`). "
                "`fedfora rehearse sites.yaml` does all of it on this machine"
            )
        for name in ("min_clients", "early_stopping_patience", "save_total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        for name in ("round_deadline", "start_deadline", "max_update_norm", "max_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be above 0, got {value}")
        if not 0 <= self.min_client_fraction <= 1:
            raise ValueError(
                f"--min_client_fraction must be in [0, 1], got {self.min_client_fraction}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"--validation_fraction must be in [0, 1), got {self.validation_fraction}"
            )
        if self.max_norm_ratio != 0 and not self.max_norm_ratio >= 1:
            raise ValueError(f"--max_norm_ratio must be 0 or at least 1, got {self.max_norm_ratio}")
        if self.min_median_cosine is not None and not -1 <= self.min_median_cosine < 1:
            raise ValueError(
                f"--min_median_cosine must be in [-1, 1), got {self.min_median_cosine}"
            )


def check_ray() -> None:
    """Raise if ray is not installed.

    Raises:
        ValueError: With the command that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError('--engine ray needs: pip install "fedfora[simulation]"')
