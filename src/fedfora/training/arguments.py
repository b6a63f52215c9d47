"""The user's training settings to transformers' TrainingArguments: what the Trainer is told."""

from typing import Any

from transformers import TrainingArguments

from fedfora.training.schedule import StepWindow
from fedfora.training.settings import LEARNING_RATE, TrainArguments, check_device

# transformers 5.23 renamed the flag; older ones know only the old name.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
_CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)


def trainer_arguments(
    settings: TrainArguments, stretch: StepWindow, *, seed: int, device: str, **extra: Any
) -> TrainingArguments:
    """Return the Trainer's arguments for a stretch of a schedule; `extra` ones win."""
    check_device(settings, device)
    rate = settings.learning_rate
    options: dict[str, Any] = {
        "max_steps": stretch.num_steps,
        "learning_rate": LEARNING_RATE if rate is None else rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "optim": settings.optim,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "fp16": settings.fp16,
        "logging_steps": settings.logging_steps,
        "seed": seed,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # every factor is used in every forward pass
    }
    if settings.gradient_checkpointing:
        options[_CHECKPOINTING] = True
    arguments = TrainingArguments(**(options | extra))
    if arguments.world_size == 1 and not arguments.deepspeed:
        # All rows of a step come as one batch, which the trainer cuts into passes.
        arguments.per_device_train_batch_size *= arguments.gradient_accumulation_steps
        arguments.gradient_accumulation_steps = 1
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a launcher starts one process for each GPU; no DataParallel
    return arguments
