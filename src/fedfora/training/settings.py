"""What the user says about training: steps, batches, optimizer."""

from dataclasses import dataclass, fields
from typing import Literal

from fedfora.config import flag
from fedfora.data.settings import DataArguments
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.reporting.settings import RunArguments


@dataclass
class TrainArguments:
    """How an adapter is trained; names and meanings are those of transformers.TrainingArguments."""

    learning_rate: float = flag(2e-4, "peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = flag(
        "cosine", "how the learning rate moves after warm-up"
    )
    warmup_ratio: float = flag(0.1, "share of all steps spent on warm-up")
    num_train_epochs: float = flag(3.0, "passes over the training rows")
    max_steps: int = flag(-1, "optimizer steps; overrides the epochs when positive")
    per_device_train_batch_size: int = flag(1, "rows per forward pass")
    gradient_accumulation_steps: int = flag(4, "forward passes per optimizer step")
    optim: Literal["adamw_torch", "sgd"] = flag("adamw_torch", "optimizer")
    loraplus_lr_ratio: float = flag(1.0, "LoRA+: factor D learns so many times faster")
    weight_decay: float = flag(0.0, "weight decay of the optimizer")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 for no clipping")
    gradient_checkpointing: bool = flag(False, "less memory for about a third more time")
    fp16: bool = flag(False, "mixed precision with float16")
    bf16: bool = flag(False, "mixed precision with bfloat16")
    logging_steps: int = flag(10, "steps between two log lines")
    seed: int = flag(42, "all randomness of the run derives from it")

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work, naming the flag and its range."""
        _at_least("per_device_train_batch_size", self.per_device_train_batch_size, 1)
        _at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        _at_least("logging_steps", self.logging_steps, 1)
        _at_least("learning_rate", self.learning_rate, 0)
        _at_least("weight_decay", self.weight_decay, 0)
        _at_least("loraplus_lr_ratio", self.loraplus_lr_ratio, 1)
        _at_least("max_grad_norm", self.max_grad_norm, 0)
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if self.max_steps == 0 or self.num_train_epochs <= 0:
            raise ValueError(
                "nothing to train: --max_steps must be positive (or -1 for epochs) and "
                f"--num_train_epochs above 0, got {self.max_steps} and {self.num_train_epochs}"
            )
        if self.fp16 and self.bf16:
            raise ValueError("--fp16 and --bf16 exclude each other")


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a training on one device."""

    run: RunArguments
    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    train: TrainArguments


SECTIONS = {field.name: field.type for field in fields(TrainSettings)}


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"--{name} must be at least {least}, got {value}")
