"""One participant trains its adapter: the only training loop, for `train` and for every client.

The loop itself is transformers' Trainer. What is added: a learning-rate schedule that can start in
the middle, because a client's few steps are a piece of the federation's whole schedule; and a count
of the tokens trained, which weighs the client in the average.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from fedfora.adapter.learning_rates import loraplus_groups
from fedfora.training.settings import TrainArguments

Encoded = list[dict[str, list[int]]]

# transformers 5.23 renamed the flag; older ones know only the old name.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
_CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)


@dataclass(frozen=True)
class Stretch:
    """A piece of a schedule: `num_steps` steps from `first_step` on, of `total_steps` in all."""

    first_step: int
    num_steps: int
    total_steps: int


@dataclass(frozen=True)
class StepReport:
    """Where a training stands after an optimizer step; `loss` is that of the step."""

    step: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class LocalResult:
    """What a participant's training did.

    Args:
        steps: Optimizer steps taken.
        loss: Mean training loss over the steps, per answer token.
        answer_tokens: Tokens with a loss, the participant's weight in an average.
        tokens: All tokens read, padding left out.
        seconds: Wall time.
    """

    steps: int
    loss: float
    answer_tokens: int
    tokens: int
    seconds: float


def steps_of(settings: TrainArguments, num_rows: int) -> int:
    """Return how many optimizer steps `settings` asks for on `num_rows` rows."""
    if settings.max_steps > 0:
        return settings.max_steps
    rows_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return max(1, math.ceil(settings.num_train_epochs * num_rows / rows_per_step))


def train_locally(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    settings: TrainArguments,
    *,
    stretch: Stretch,
    seed: int,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> LocalResult:
    """Train the model's active adapter in place on encoded rows.

    Args:
        model: A PEFT model whose adapter is trainable.
        tokenizer: Pads the batches.
        encoded: Rows with `input_ids` and `labels`.
        settings: Batch, optimizer and learning rate.
        stretch: Which steps of which schedule to take.
        seed: Seed of the order of rows and of dropout.
        on_step: Called after every optimizer step.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _trainer_arguments(settings, stretch, seed, scratch, str(model.device))
        trainer = _AdapterTrainer(
            model=model,
            args=arguments,
            optimizer_cls_and_kwargs=_loraplus(model, arguments, settings.loraplus_lr_ratio),
            train_dataset=encoded,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            stretch=stretch,
            warmup_ratio=settings.warmup_ratio,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_AfterStep(trainer, on_step))
        started = time.perf_counter()
        output = trainer.train()
    model.eval()
    return LocalResult(
        steps=output.global_step,
        loss=output.training_loss,
        answer_tokens=trainer.answer_tokens,
        tokens=trainer.tokens,
        seconds=time.perf_counter() - started,
    )


class _AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """`Trainer` that runs a stretch of a longer schedule and counts the tokens it trains on."""

    def __init__(self, *, stretch: Stretch, warmup_ratio: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stretch = stretch
        self.warmup_ratio = warmup_ratio
        self.answer_tokens = self.tokens = 0
        self.step_loss: torch.Tensor | float = 0.0

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Build the whole schedule and start it where this stretch starts."""
        optimizer = optimizer or self.optimizer
        whole = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=math.ceil(self.warmup_ratio * self.stretch.total_steps),
            num_training_steps=self.stretch.total_steps,
        )
        rate_at, first = whole.lr_lambdas[0], self.stretch.first_step
        self.lr_scheduler = LambdaLR(optimizer, lambda step: rate_at(first + step))
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Count the tokens on their way to the model, and add up the step's loss."""
        self.answer_tokens += int((inputs["labels"][:, 1:] != -100).sum())
        self.tokens += int(inputs["attention_mask"].sum())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.step_loss = self.step_loss + loss.detach()
        return loss


class _AfterStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Reports every optimizer step."""

    def __init__(self, trainer: _AdapterTrainer, on_step: Callable[[StepReport], None]) -> None:
        self.trainer, self.on_step = trainer, on_step

    def on_step_end(self, _: Any, state: Any, __: Any, **kwargs: Any) -> None:
        """Report the step and start the next one's loss at zero."""
        report = StepReport(state.global_step, float(self.trainer.step_loss), self.trainer.tokens)
        self.trainer.step_loss = 0.0
        self.on_step(report)


def _loraplus(model: Any, arguments: TrainingArguments, ratio: float) -> Any:
    """Return the optimizer's class and options with LoRA+'s groups; None for the usual ones."""
    if ratio == 1:
        return None
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    groups = loraplus_groups(
        model,
        learning_rate=arguments.learning_rate,
        ratio=ratio,
        weight_decay=arguments.weight_decay,
    )
    return optimizer, {**options, "params": groups}


def _trainer_arguments(
    settings: TrainArguments, stretch: Stretch, seed: int, scratch: str, device: str
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=stretch.num_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        fp16=settings.fp16,
        bf16=settings.bf16,
        logging_steps=settings.logging_steps,
        seed=seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        label_names=["labels"],
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({_CHECKPOINTING: True} if settings.gradient_checkpointing else {}),
    )
