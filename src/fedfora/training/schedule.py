"""How many optimizer steps, and which learning rate each of them has."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


@dataclass(frozen=True)
class StepWindow:
    """A piece of a schedule: `num_steps` steps from `first_step` on, of `total_steps` in all."""

    first_step: int
    num_steps: int
    total_steps: int


def num_steps(
    num_rows: int,
    *,
    max_steps: int,
    num_train_epochs: float,
    batch_size: int,
    accumulation: int,
    num_processes: int = 1,
) -> int:
    """Return the optimizer steps of a training: `max_steps` if positive, otherwise whole passes.

    The last step of a pass may have fewer batches, so that every pass sees every row.

    Args:
        num_rows: Training rows.
        max_steps: Steps asked for; -1 for passes.
        num_train_epochs: Passes over the rows; the last may be a part of one.
        batch_size: Rows of a process in a forward pass.
        accumulation: Forward passes per step.
        num_processes: Processes that share the rows.
    """
    if max_steps > 0:
        return max_steps
    batches = math.ceil(math.ceil(num_rows / batch_size) / num_processes)
    return max(1, math.ceil(num_train_epochs * math.ceil(batches / accumulation)))


def schedule_at(
    step: int, total_steps: int, *, lr_scheduler_type: str, warmup_ratio: float
) -> float:
    """Return the share of the peak learning rate that a step, counted from 0, has."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    stretch = StepWindow(step, 1, total_steps)
    schedule = scheduler_from(
        optimizer, stretch, lr_scheduler_type=lr_scheduler_type, warmup_ratio=warmup_ratio
    )
    return float(schedule.get_last_lr()[0])


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
    rate_at, first = schedule.lr_lambdas[0], stretch.first_step
    return LambdaLR(optimizer, lambda step: rate_at(first + step))
