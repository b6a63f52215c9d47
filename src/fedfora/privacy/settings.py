"""The user's settings for differential privacy: at which level, how much."""

from dataclasses import dataclass
from typing import Literal

from fedfora.config import Options, flag
from fedfora.privacy.accounting import noise_multiplier_for
from fedfora.registry import counted

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
        within="[0, inf)",
    )
    sampling_rate: float | None = flag(
        None,
        "record: share of a site's rows in a step's sample, on average; default 0.5 (without "
        "shared_noise of 300 rows at most), or by the batch if one is given",
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


def check_num_rows(arguments: PrivacyArguments, num_rows: int) -> None:
    """Raise if delta or sample cannot be meant for so few rows, naming the flag and the rows."""
    rate, rows = arguments.sampling_rate, counted(num_rows, "row")
    if arguments.privacy_unit == "record" and arguments.target_delta * num_rows >= 1:
        raise ValueError(
            f"--target_delta {arguments.target_delta:g} is not below one over {rows}: "
            "publishing one record at random would satisfy it"
        )
    if rate is not None and rate < 1 / num_rows:
        raise ValueError(
            f"--sampling_rate {rate:g} is less than one of {rows} in a step's sample: at least "
            f"{1.005 / num_rows:.3g}"  # rounded up
        )


def noise_of(arguments: PrivacyArguments, *, count: int, sampling_rate: float = 1.0) -> float:
    """Return z: what the user states, or what the budget needs for all steps or rounds."""
    if arguments.noise_multiplier is not None:
        return arguments.noise_multiplier
    return noise_multiplier_for(
        target_epsilon=float(arguments.target_epsilon or 0),
        delta=arguments.target_delta,
        sampling_rate=sampling_rate,
        count=count,
    )
