"""The user's settings for differential privacy: at which level, how much."""

from dataclasses import dataclass
from typing import Literal

from fedfora.config import Options, flag

PRIVACY_DIR = "FEDFORA_PRIVACY_DIR"  # in the environment: where ledgers are


@dataclass
class PrivacyArguments(Options):
    """Differential privacy, of single records or of single sites."""

    privacy_unit: Literal["none", "record", "site"] = flag(
        "none",
        "differential privacy: of each record at its site, of each site, or none",
        often=True,
    )
    target_epsilon: float | None = flag(
        None,
        "budget: sets the noise for the planned steps, and stops what would exceed it",
        often=True,
        within="(0, inf]",
    )
    target_delta: float = flag(
        1e-5, "delta of the budget; well below one over the number of records", within="(0, 1)"
    )
    noise_multiplier: float | None = flag(
        None,
        "noise over clipping norm, instead of the one that target_epsilon sets",
        within="[0, inf]",
    )
    sampling_rate: float | None = flag(
        None,
        "record: share of a site's rows in a step's sample, on average; default 0.5, or by the "
        "batch if one is given",
        within="(0, 1]",
    )
    shared_noise: bool = flag(
        False,
        "record: one step a round, whose noise the sites add in shares, under secure aggregation",
    )
    clipping_norm: float = flag(
        1.0,
        "norm to which each record's gradient (each site's update) is clipped",
        within="(0, inf]",
    )
    privacy_dir: str | None = flag(
        None,
        "directory of the ledgers of spent privacy, one for the same rows in all runs; default "
        "$FEDFORA_PRIVACY_DIR, or ~/.local/share/fedfora/privacy",
    )

    def __post_init__(self) -> None:
        """Refuse contradictions, naming the flags."""
        super().__post_init__()
        stated = self.target_epsilon is not None or self.noise_multiplier is not None
        if self.privacy_unit == "none" and stated:
            raise ValueError(
                "--target_epsilon and --noise_multiplier need --privacy_unit record or site"
            )
        if self.privacy_unit != "none" and not stated:
            raise ValueError(
                f"--privacy_unit {self.privacy_unit} needs --target_epsilon or --noise_multiplier"
            )
        if self.shared_noise and self.privacy_unit != "record":
            raise ValueError("--shared_noise needs --privacy_unit record; sites share it anyway")
        if self.sampling_rate is not None and self.privacy_unit != "record":
            raise ValueError("--sampling_rate needs --privacy_unit record")
        if self.clipping_norm == float("inf") and self.noise_multiplier != 0:
            raise ValueError("--clipping_norm inf bounds nothing: it needs --noise_multiplier 0")


def check_delta(arguments: PrivacyArguments, num_rows: int) -> None:
    """Raise if delta promises nothing for so few rows, naming the flag and the rows."""
    if arguments.privacy_unit == "record" and arguments.target_delta * num_rows >= 1:
        raise ValueError(
            f"--target_delta {arguments.target_delta:g} is not below one over {num_rows} rows: "
            "publishing one record at random would satisfy it"
        )
