"""How many optimizer steps, and which learning rate each of them has."""

import math
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from fedfora.privacy.settings import PrivacyArguments
from fedfora.training.settings import EPOCHS, TrainArguments, private_steps


@dataclass(frozen=True)
class StepWindow:
    """A piece of a schedule: `num_steps` steps from `first_step` on, of `total_steps` in all."""

    first_step: int
    num_steps: int
    total_steps: int


def num_steps(
    settings: TrainArguments, privacy: PrivacyArguments, num_rows: int, num_processes: int = 1
) -> int:
    """Return the optimizer steps of a training: `max_steps` if positive, otherwise whole passes.

    The last step of a pass may have fewer batches, so that every pass sees every row.

    Args:
        settings: Steps or passes, rows of a process in a forward pass, forward passes per step.
        privacy: With record privacy a step's sample is drawn.
        num_rows: Training rows.
        num_processes: Processes that share the rows.
    """
    if privacy.privacy_unit == "record":
        return private_steps(settings, privacy, num_rows)
    if settings.max_steps > 0:
        return settings.max_steps
    batches = math.ceil(math.ceil(num_rows / settings.per_device_train_batch_size) / num_processes)
    steps_of_pass = math.ceil(batches / settings.gradient_accumulation_steps)
    return max(1, math.ceil((settings.num_train_epochs or EPOCHS) * steps_of_pass))


def scheduler_from(
    optimizer: Any, stretch: StepWindow, *, lr_scheduler_type: str, warmup_ratio: float
) -> LambdaLR:
    """Return the whole schedule, started where the stretch starts."""
    schedule = get_scheduler(
        lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=math.ceil(warmup_ratio * stretch.total_steps),
        num_training_steps=stretch.total_steps,
    )
    return started_at(schedule, stretch.first_step)


def started_at(schedule: LambdaLR, first_step: int) -> LambdaLR:
    """Return a schedule that begins where another one is after `first_step` steps."""
    rate_at = schedule.lr_lambdas[0]  # of all groups: transformers makes no other
    return LambdaLR(schedule.optimizer, lambda step: rate_at(first_step + step))
