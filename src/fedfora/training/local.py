"""One participant trains its adapter: the only training loop, for `train` and for every client.

The loop itself is transformers' Trainer. What is added: a learning-rate schedule that can start in
the middle, because a client's few steps are a piece of the federation's whole schedule; and a count
of the tokens trained, which weighs the client in the average.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from fedfora.adapter.state import write_state
from fedfora.data.encoding import Encoded
from fedfora.models.batches import collate
from fedfora.models.losses import lies_flat
from fedfora.models.saving import read_adapter
from fedfora.privacy.settings import PrivacyArguments
from fedfora.training.arguments import trainer_arguments
from fedfora.training.checkpoints import read_progress, step_of
from fedfora.training.dp_sgd import TRAINER_ARGUMENTS, RecordPrivacy, self_test
from fedfora.training.packing import collate_packed, pack
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments, check_device
from fedfora.training.trainer import AdapterTrainer, StepReport

if TYPE_CHECKING:
    from fedfora.training.run import Training


@dataclass(frozen=True)
class LocalResult:
    """What a participant's training did.

    Args:
        loss: Mean training loss over the steps, per answer token.
        answer_tokens: Tokens with a loss, the participant's weight in an average.
        tokens: All tokens read, padding left out.
        steps: Optimizer steps taken.
        seconds: Wall time.
    """

    loss: float
    answer_tokens: int
    tokens: int
    steps: int
    seconds: float


def check_trainable(
    model: Any, tokenizer: Any, train: TrainArguments, privacy: PrivacyArguments
) -> None:
    """Raise for what this model cannot do, before anything is written, deleted or paid for.

    Raises:
        ValueError: If the device, gradient checkpointing, packing or the gradients of single rows
            do not work, naming the flag.
    """
    check_device(train, model.device.type)
    base = model.get_base_model()
    if train.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise ValueError(f"--gradient_checkpointing: {type(base).__name__} does not support it")
    if train.packing and not lies_flat(model):
        raise ValueError(
            f"--packing: {type(base).__name__} cannot be told where rows begin; leave --packing out"
        )
    if privacy.privacy_unit == "record":
        self_test(model, len(tokenizer))


def train_locally(
    model: Any,
    encoded: Encoded,
    settings: TrainArguments,
    *,
    stretch: StepWindow,
    seed: int,
    callbacks: Iterable[TrainerCallback] = (),
    on_step: Callable[[StepReport], None] = lambda report: None,
    run: Training | None = None,
    privacy: RecordPrivacy | None = None,
    proximal_mu: float = 0.0,
) -> LocalResult:
    """Train the model's active adapter in place on encoded rows.

    Args:
        model: A PEFT model whose adapter is trainable.
        encoded: Rows with `input_ids` and `labels`.
        settings: Batch, optimizer and learning rate.
        stretch: Which steps of which schedule to take.
        seed: Seed of the order of rows and of dropout.
        callbacks: Further callbacks of the Trainer, called after the step was reported.
        on_step: Called after every optimizer step.
        run: The training to keep, validate and report; None for a client's few steps.
        privacy: How single records are hidden, if they are; the caller or a callback pays.
        proximal_mu: FedProx's pull towards the parameters at the start; 0 for none.

    Raises:
        ValueError: If the checkpoint belongs to another training, or saving fails.
        KeyboardInterrupt: After a signal, saying how to resume.
    """
    with tempfile.TemporaryDirectory() as scratch:
        where = {"output_dir": scratch} if run is None else run.trainer_arguments()
        arguments = trainer_arguments(
            settings,
            stretch,
            seed=seed,
            device=model.device.type,
            bf16=settings.bf16 or model.get_input_embeddings().weight.dtype == torch.bfloat16,
            **(where | (TRAINER_ARGUMENTS if privacy is not None else {})),
        )
        trainer = AdapterTrainer(
            settings=settings,
            stretch=stretch,
            on_step=on_step,
            run=run,
            privacy=privacy,
            model=model,
            args=arguments,
            train_dataset=training_rows(encoded, settings),
            data_collator=collate_packed if settings.packing else collate,
        )
        for callback in ([ProximalTerm(proximal_mu)] if proximal_mu else []) + list(callbacks):
            trainer.add_callback(callback)
        started = time.perf_counter()
        steps = _run(trainer)
    release_model(trainer, model)
    progress = trainer.progress
    return LocalResult(
        steps=steps,
        loss=progress.loss_sum / max(1, steps),
        answer_tokens=progress.answer_tokens,
        tokens=progress.tokens,
        seconds=time.perf_counter() - started,
    )


def _run(trainer: AdapterTrainer) -> int:
    """Train to the end, or to the checkpoint that a signal asks for; return the steps."""
    run, last = trainer.run, trainer.stretch.num_steps
    if run is None:
        return int(trainer.train().global_step)
    start = run.resume_from
    if start is not None:
        trainer.progress = read_progress(start, run.identity)
        if step_of(start) >= last:  # nothing is left: the Trainer would take one step too many
            state = read_adapter(start)
            write_state(trainer.model, state)
            run.save(Path(run.settings.run.output_dir), state)
            return last
    with Interruption() as interruption:
        trainer.add_callback(interruption)
        output = trainer.train(resume_from_checkpoint=None if start is None else str(start))
    step = interruption.stopped_at
    if step is not None and step < last:
        raise KeyboardInterrupt(
            f"after step {step} of {last}, all of it saved; the same command with "
            "--resume_from_checkpoint last resumes it"
        )
    trainer.save_model(run.settings.run.output_dir)
    return int(output.global_step)


def release_model(trainer: Any, model: Any) -> None:
    """Take back what accelerate has put on the model: its autocast would stay on for good.

    It wraps `forward` once and marks the model, so that a later training with another precision
    would run with the first one's.
    """
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.__dict__.pop("_is_accelerate_prepared", None)
    model.eval()


def training_rows(encoded: Encoded, settings: TrainArguments) -> list[Any]:
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
    """Adds the gradient of the proximal term of weight `mu`."""

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


# Ctrl-C and a polite kill: finish the step, save, stop. A second one stops at once.

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Turns the first signal into a checkpoint and the end of the training.

    Use it as a context manager around the training. All processes of a training stop after the
    same step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped_at: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Listen, where Python allows it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt("at once, without saving")
        self.asked = True
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nfinishing this step, then saving; repeat to stop at once, unsaved\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process was asked to."""
        stop_asked = self.asked
        if args.world_size > 1:
            votes = torch.tensor([int(stop_asked)], device=args.device)
            torch.distributed.all_reduce(votes)
            stop_asked = bool(votes.item())
        if stop_asked:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
