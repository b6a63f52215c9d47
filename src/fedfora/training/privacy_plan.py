"""What the user says about record privacy, and a site's rows, to noise, clipping and a ledger."""

from pathlib import Path

from fedfora.privacy.accounting import Ledger, Release, noise_multiplier_for
from fedfora.privacy.settings import PrivacyArguments
from fedfora.privacy.statement import record_statement
from fedfora.training.private_gradient import RecordPrivacy
from fedfora.training.settings import TrainArguments


def plan_record_privacy(
    arguments: PrivacyArguments, train: TrainArguments, *, num_rows: int, total_steps: int
) -> RecordPrivacy | None:
    """Return noise and clipping for a site's whole training; None where the user wants none.

    Args:
        arguments: Budget or noise multiplier, clipping norm.
        train: Batch size and accumulation, whose product is a step's expected number of rows.
        num_rows: Rows of the site.
        total_steps: Steps that the budget must last for.

    Raises:
        ValueError: If something does not go with record privacy, naming the flag.
    """
    if arguments.privacy != "record":
        return None
    _check(arguments, train, num_rows)
    rows_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    expected_rows = min(float(rows_per_step), float(num_rows))
    noise_multiplier = arguments.noise_multiplier
    if noise_multiplier is None:
        noise_multiplier = noise_multiplier_for(
            target_epsilon=float(arguments.target_epsilon or 0),
            delta=arguments.target_delta,
            sampling_rate=expected_rows / num_rows,
            count=total_steps,
        )
    return RecordPrivacy(noise_multiplier, arguments.clipping_norm, expected_rows, num_rows)


def open_ledger(arguments: PrivacyArguments, output_dir: str, site: int) -> Ledger:
    """Return the ledger of a site's records, with what earlier runs spent."""
    directory = Path(arguments.privacy_dir or Path(output_dir) / "privacy")
    return Ledger.open(
        directory / f"site-{site:03d}.json",
        delta=arguments.target_delta,
        target_epsilon=arguments.target_epsilon,
    )


def spend_steps(ledger: Ledger, privacy: RecordPrivacy, steps: int) -> str:
    """Enter the next steps into a ledger and return the guarantee that then holds.

    Raises:
        BudgetSpent: If the steps would exceed the budget; they must not be taken.
    """
    ledger.spend(Release(privacy.sampling_rate, privacy.noise_multiplier, steps))
    return record_statement(ledger, clipping_norm=privacy.clipping_norm, num_rows=privacy.num_rows)


def _check(arguments: PrivacyArguments, train: TrainArguments, num_rows: int) -> None:
    if arguments.target_delta * num_rows >= 1:
        raise ValueError(
            f"--target_delta {arguments.target_delta:g} is not below one over {num_rows} rows: "
            "publishing one record at random would satisfy it"
        )
    if train.fp16:
        raise ValueError(
            "--fp16 scales gradients before they can be clipped: use --bf16 with --privacy record"
        )
