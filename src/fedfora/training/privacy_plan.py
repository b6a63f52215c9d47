"""What the user says about record privacy, and a site's rows, to noise, clipping and a ledger."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from fedfora.privacy.accounting import Ledger, Release, noise_multiplier_for, record_statement
from fedfora.privacy.settings import PrivacyArguments, check_delta
from fedfora.training.dp_sgd import RecordPrivacy
from fedfora.training.local import LocalResult
from fedfora.training.settings import TrainArguments, check_record_privacy


@dataclass(frozen=True)
class PaidSteps:
    """Steps that were entered into a site's ledger and may now be taken.

    Args:
        privacy: Noise and clipping of the steps.
        ledger: What the site has spent, these steps included.
        statement: The guarantee that holds afterwards, in one sentence.
    """

    privacy: RecordPrivacy
    ledger: Ledger
    statement: str

    def event(self) -> dict[str, float | str | None]:
        """Return what the run's record says."""
        epsilon = self.ledger.epsilon
        return {
            "epsilon": epsilon if math.isfinite(epsilon) else None,
            "delta": self.ledger.delta,
            "noise_multiplier": self.privacy.noise_multiplier,
            "sampling_rate": self.privacy.sampling_rate,
            "statement": self.statement,
        }


def pay_for_steps(
    arguments: PrivacyArguments,
    train: TrainArguments,
    *,
    output_dir: str,
    site: int,
    num_rows: int,
    num_steps: int,
    total_steps: int,
    what: str,
) -> PaidSteps | None:
    """Enter the next steps of a site into its ledger; None where records are not to be hidden.

    Args:
        arguments: Budget or noise multiplier, clipping norm.
        train: Batch size and accumulation, whose product is a step's expected number of rows.
        output_dir: Run directory, which holds the ledger where the user names no other place.
        site: The site's number.
        num_rows: Rows of the site.
        num_steps: Steps that are taken next.
        total_steps: Steps that the budget must last for.
        what: Which training or round this is; one that was broken off is not paid for twice.

    Raises:
        BudgetSpent: If the steps would exceed the budget; they must not be taken.
        ValueError: If something does not go with record privacy, naming the flag.
    """
    if arguments.privacy_unit != "record":
        return None
    privacy = plan_record_privacy(arguments, train, num_rows=num_rows, total_steps=total_steps)
    ledger = open_ledger(arguments, output_dir, f"site-{site:03d}")
    ledger.begin(what, Release(privacy.sampling_rate, privacy.noise_multiplier, num_steps))
    statement = record_statement(ledger, clipping_norm=privacy.clipping_norm, num_rows=num_rows)
    return PaidSteps(privacy, ledger, statement)


def plan_record_privacy(
    arguments: PrivacyArguments, train: TrainArguments, *, num_rows: int, total_steps: int
) -> RecordPrivacy:
    """Return noise and clipping for a site's whole training.

    Raises:
        ValueError: If something does not go with record privacy, naming the flag.
    """
    check_record_privacy(arguments, train)
    check_delta(arguments, num_rows)
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


def open_ledger(arguments: PrivacyArguments, output_dir: str, name: str) -> Ledger:
    """Return a ledger with what earlier runs spent."""
    directory = Path(arguments.privacy_dir or Path(output_dir) / "privacy")
    return Ledger.open(
        directory / f"{name}.json",
        delta=arguments.target_delta,
        target_epsilon=arguments.target_epsilon,
    )


def public_part(result: LocalResult, privacy: RecordPrivacy) -> LocalResult:
    """Return a training's result without the numbers that depend on the rows or on the samples.

    The loss is 0, for "not told"; the expected number of rows stands for the tokens and weighs the
    site.
    """
    rows = max(1, round(privacy.expected_rows * result.steps))
    return replace(result, loss=0.0, answer_tokens=rows, tokens=0)
