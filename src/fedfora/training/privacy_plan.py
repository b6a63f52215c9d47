"""From the settings of record privacy and a site's rows to noise, clipping and a ledger."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fedfora.models.settings import AdapterArguments
from fedfora.privacy.accounting import Release
from fedfora.privacy.ledger import Ledger, open_ledger, record_statement
from fedfora.privacy.outlook import noise_to_signal, outlook_line
from fedfora.privacy.settings import PrivacyArguments
from fedfora.training.dp_sgd import RecordPrivacy
from fedfora.training.local import LocalResult
from fedfora.training.settings import TrainArguments

RATE_TIMES_WIDTH = 21.0  # and times the square root of the steps


@dataclass(frozen=True)
class PrivateTraining:
    """A training's noise and clipping, and the ledger that its steps are entered into.

    Args:
        run: What the ledger calls this run.
        note: What the statement says besides the guarantee.
    """

    privacy: RecordPrivacy
    ledger: Ledger
    run: str
    note: str = ""

    def pay(self, num_steps: int, **where: Any) -> None:
        """Enter the next steps, before they are taken.

        Args:
            num_steps: How many.
            **where: In the run, for the ledger's reader: the round, or the first step.

        Raises:
            BudgetSpent: If the steps would exceed the budget; they must not be taken.
        """
        settings = {**where, "clipping_norm": self.privacy.clipping_norm}
        settings["rows"] = self.privacy.num_rows
        self.ledger.spend(self.release(num_steps), run=self.run, settings=settings)

    def release(self, num_steps: int) -> Release:
        """Return what a number of steps releases."""
        return Release(self.privacy.sampling_rate, self.privacy.noise_multiplier, num_steps)

    @property
    def statement(self) -> str:
        """The guarantee for all that the ledger holds, in one sentence."""
        guarantee = record_statement(
            self.ledger, clipping_norm=self.privacy.clipping_norm, num_rows=self.privacy.num_rows
        )
        return guarantee + self.note

    def outlook(
        self, trained: int, *, num_steps: int, public_start: bool, num_sites: int = 1
    ) -> str:
        """Return what to expect with this number of trained parameters, at sites like this one."""
        run, rows = self.release(num_steps), self.privacy.num_rows
        nu = noise_to_signal(run, rows=rows, trained=trained, sites=num_sites)
        return outlook_line(nu, public_start=public_start)

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


class PaySteps(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Enters each stretch between two checkpoints as it begins.

    A training that was killed resumes at its last checkpoint: what it repeats is paid again.
    """

    def __init__(self, training: PrivateTraining, save_steps: int) -> None:
        self.training, self.save_steps, self.paid_until = training, save_steps, 0

    def on_step_begin(self, _: Any, state: Any, __: Any, **kwargs: Any) -> None:
        """Pay up to the next checkpoint."""
        step = state.global_step
        if step >= self.paid_until:
            until = min(step - step % self.save_steps + self.save_steps, state.max_steps)
            self.training.pay(until - step, first_step=step)
            self.paid_until = until


def plan_private_training(
    arguments: PrivacyArguments,
    train: TrainArguments,
    *,
    output_dir: str,
    ledger: str,
    num_rows: int,
    first_step: int,
    total_steps: int,
) -> PrivateTraining | None:
    """Return how a site trains with its records hidden; None if they are not to be.

    Nothing is spent yet.

    Args:
        arguments: Budget or noise multiplier, clipping norm.
        train: Batch, where it says how large a step's sample is.
        output_dir: Run directory, by which the ledger knows the run.
        ledger: Name of the ledger: `ledger_of` the rows, or a site's own.
        num_rows: Rows of the site.
        first_step: Where the next steps begin.
        total_steps: Steps that the budget must last for.

    Raises:
        BudgetSpent: If the steps from the first one on would exceed the budget, even with more
            noise than the plan alone needs.
    """
    if arguments.privacy_unit != "record":
        return None
    expected_rows = train.sampling_rate(arguments, num_rows) * num_rows
    rate = expected_rows / num_rows
    opened, left = open_ledger(arguments, ledger), max(1, total_steps - first_step)
    noise_multiplier = arguments.noise_multiplier
    if noise_multiplier is None:
        noise_multiplier = opened.noise_for(rate, planned=total_steps, left=left)
    privacy = RecordPrivacy(noise_multiplier, arguments.clipping_norm, expected_rows, num_rows)
    return PrivateTraining(privacy, opened, str(Path(output_dir).resolve()))


def with_learning_rate(
    train: TrainArguments,
    privacy: PrivacyArguments,
    adapter: AdapterArguments,
    model: Any,
    num_steps: int,
) -> TrainArguments:
    """Return the settings with the learning rate that suits noisy steps, unless one is named.

    Under noise Adam's steps are of one length whatever the gradient, so a few of them must lead
    far; how far depends on the width of the layers, as in a training without noise (Yang et al.
    2022, https://arxiv.org/abs/2203.03466, Table 3). Of T steps the noise leads sqrt(T) as far as
    of one, and that sets how long they may be. From a start that has learned the form of the
    answers the way is shorter.
    """
    if privacy.privacy_unit != "record" or train.learning_rate is not None:
        return train
    width = model.get_input_embeddings().weight.shape[1]
    return replace(train, learning_rate=rate_for_noise(width, num_steps, adapter))


def rate_for_noise(width: int, num_steps: int, adapter: AdapterArguments) -> float:
    """Return the learning rate of private steps on layers of a width."""
    rate = RATE_TIMES_WIDTH / width / math.sqrt(num_steps)
    return rate if adapter.start_adapter is None else rate / 2


def public_part(result: LocalResult, privacy: RecordPrivacy) -> LocalResult:
    """Return a training's result without the numbers that depend on the rows or on the samples.

    Loss and time are 0, for "not told"; the expected number of rows stands for the tokens and
    weighs the site.
    """
    rows = max(1, round(privacy.expected_rows * result.steps))
    return replace(result, loss=0.0, answer_tokens=rows, tokens=0, seconds=0.0)
