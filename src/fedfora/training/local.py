"""One participant trains its adapter: the only training loop, for `train` and for every client.

The loop itself is transformers' Trainer. What is added: a learning-rate schedule that can start in
the middle, because a client's few steps are a piece of the federation's whole schedule; and a count
of the tokens trained, which weighs the client in the average.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback, TrainerCallback, TrainingArguments

from fedfora.data.encoding import IGNORED, Encoded
from fedfora.privacy.settings import PrivacyArguments
from fedfora.training.arguments import check_device, loraplus_optimizer, trainer_arguments
from fedfora.training.dp_sgd import (
    TRAINER_ARGUMENTS,
    PrivateSteps,
    RecordPrivacy,
    self_test,
)
from fedfora.training.long_run import Checkpointing
from fedfora.training.packing import check_no_leak, collate_packed, pack
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments
from fedfora.training.trainer import AdapterTrainer, AfterStep, StepReport


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


def check_trainable(
    model: Any, tokenizer: Any, encoded: Encoded, train: TrainArguments, privacy: PrivacyArguments
) -> None:
    """Raise for what this model cannot do, before anything is written, deleted or paid for.

    Raises:
        ValueError: If the device, gradient checkpointing, packing or the gradients of single rows
            do not work, naming the flag.
    """
    check_device(train, model.device.type)
    base = model.get_base_model()
    if train.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise ValueError(f"--gradient_checkpointing: {type(base).__name__} does not have it")
    if train.packing:
        check_no_leak(model, encoded)
    if privacy.privacy_unit == "record":
        self_test(model, len(tokenizer))


def train_locally(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    settings: TrainArguments,
    *,
    stretch: StepWindow,
    seed: int,
    callbacks: Iterable[TrainerCallback] = (),
    on_step: Callable[[StepReport], None] = lambda report: None,
    long_run: Checkpointing | None = None,
    privacy: RecordPrivacy | None = None,
    proximal_mu: float = 0.0,
) -> LocalResult:
    """Train the model's active adapter in place on encoded rows.

    Args:
        model: A PEFT model whose adapter is trainable.
        tokenizer: Pads the batches.
        encoded: Rows with `input_ids` and `labels`.
        settings: Batch, optimizer and learning rate.
        stretch: Which steps of which schedule to take.
        seed: Seed of the order of rows and of dropout.
        callbacks: Further callbacks of the Trainer, called after the step was reported.
        on_step: Called after every optimizer step.
        long_run: Checkpoints, validation and reports; None for a client's few steps.
        privacy: How single records are hidden, if they are; the caller or a callback pays.
        proximal_mu: FedProx's pull towards the parameters at the start; 0 for none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        where = {"output_dir": scratch} if long_run is None else long_run.trainer_arguments
        arguments = trainer_arguments(
            settings,
            stretch,
            seed=seed,
            device=model.device.type,
            bf16=settings.bf16 or model.get_input_embeddings().weight.dtype == torch.bfloat16,
            **(where | (TRAINER_ARGUMENTS if privacy is not None else {})),
        )
        make = AdapterTrainer if long_run is None else long_run.make_trainer
        trainer = _make_trainer(make, model, tokenizer, encoded, settings, arguments, stretch)
        if privacy is not None:
            trainer.private = PrivateSteps(privacy, settings.max_tokens_per_pass)
        trainer.add_callback(AfterStep(trainer, on_step))
        if proximal_mu:
            trainer.add_callback(ProximalTerm(proximal_mu))
        for callback in callbacks:
            trainer.add_callback(callback)
        started = time.perf_counter()
        output = trainer.train() if long_run is None else long_run.train(trainer)
    _release(trainer, model)
    progress = trainer.progress
    return LocalResult(
        steps=output.global_step,
        loss=progress.loss_sum / max(1, output.global_step),
        answer_tokens=progress.answer_tokens,
        tokens=progress.tokens,
        seconds=time.perf_counter() - started,
    )


def _make_trainer(
    make: Callable[..., AdapterTrainer],
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    settings: TrainArguments,
    arguments: TrainingArguments,
    stretch: StepWindow,
) -> AdapterTrainer:
    trainer = make(
        model=model,
        args=arguments,
        optimizer_cls_and_kwargs=loraplus_optimizer(model, arguments, settings.loraplus_lr_ratio),
        train_dataset=training_rows(encoded, settings),
        data_collator=(
            collate_packed
            if settings.packing
            else DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        ),
        stretch=stretch,
        warmup_ratio=settings.warmup_ratio,
        group_by_length=settings.group_by_length,
        max_tokens_per_pass=settings.max_tokens_per_pass,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _release(trainer: Any, model: Any) -> None:
    """Take back what accelerate has put on the model: its autocast would stay on for good.

    It wraps `forward` once and marks the model, so that a later training with another precision
    would run with the first one's.
    """
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.__dict__.pop("_is_accelerate_prepared", None)
    model.eval()


def training_rows(encoded: Encoded, settings: TrainArguments) -> Encoded:
    """Return what is drawn for a batch: rows, or sequences of packed rows."""
    return pack(encoded, settings.packing_length) if settings.packing else encoded


# FedProx: a pull towards where a training began, as a callback of the training loop.
#
#     objective = loss + mu / 2 ||w - w_0||^2        over the trained parameters w
#
# Li et al. 2020 (https://arxiv.org/abs/1812.06127, Eq. 2). The term's gradient, mu (w - w_0), is
# added before each optimizer step, so it counts once however many batches a step accumulates, and
# after the clipping of the loss's own gradient. Reported losses are without the term.


class ProximalTerm(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Adds the gradient of the proximal term.

    Args:
        mu: Its weight, above 0.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self._starts: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def on_train_begin(self, _: Any, __: Any, ___: Any, *, model: Any, **kwargs: Any) -> None:
        """Remember where the parameters begin."""
        trained = (p for p in model.parameters() if p.requires_grad)
        self._starts = [(parameter, parameter.detach().clone()) for parameter in trained]

    @torch.no_grad()
    def on_pre_optimizer_step(self, _: Any, __: Any, ___: Any, **kwargs: Any) -> None:
        """Add mu (w - w_0) to the gradients."""
        for parameter, start in self._starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.mu)
