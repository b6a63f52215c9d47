"""What `train` adds to a client's few steps: checkpoints, resuming, validation, reports."""

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from fedfora.adapter.state import write_state
from fedfora.data.encoding import Encoded
from fedfora.models.saving import read_adapter
from fedfora.training.checkpoints import read_progress, step_of
from fedfora.training.long_trainer import LongTrainer, SaveAdapter


@dataclass(frozen=True)
class Checkpointing:
    """How a long training is kept, watched and gone on with.

    Args:
        trainer_arguments: For transformers' TrainingArguments: where and when to save, evaluate
            and report, and DeepSpeed's configuration.
        adapter_dir: Where the trained adapter goes.
        save_adapter: Writes the adapter's files into a directory.
        save_total_limit: Checkpoints to keep; None for all.
        identity: What a checkpoint must agree on with the training that goes on from it.
        metrics_bytes: Returns the length of metrics.jsonl.
        resume_from: Checkpoint to go on from; None to start at the beginning.
        validation: Encoded rows to evaluate on; None for no validation.
        patience: Evaluations without a better loss before the training stops; None for never.
        threshold: How much lower a loss must be to count as better.
        on_validation: Called with the step and the loss of every validation.
    """

    trainer_arguments: dict[str, Any]
    adapter_dir: Path
    save_adapter: SaveAdapter
    save_total_limit: int | None
    identity: Mapping[str, Any]
    metrics_bytes: Callable[[], int]
    resume_from: Path | None = None
    validation: Encoded | None = None
    patience: int | None = None
    threshold: float = 0.0
    on_validation: Callable[[int, float], None] = lambda step, loss: None

    def make_trainer(self, **kwargs: Any) -> LongTrainer:
        """Return the Trainer for this run; `kwargs` are those of `AdapterTrainer`."""
        trainer = LongTrainer(
            save_adapter=self.save_adapter,
            save_total_limit=self.save_total_limit,
            identity=self.identity,
            metrics_bytes=self.metrics_bytes,
            eval_dataset=self.validation,
            **kwargs,
        )
        trainer.add_callback(_AfterValidation(self.on_validation))
        if self.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(self.patience, self.threshold))
        return trainer

    def train(self, trainer: LongTrainer) -> Any:
        """Train to the end, or to the checkpoint that a signal asked for; save the adapter.

        Raises:
            ValueError: If the checkpoint belongs to another training, or saving fails.
            KeyboardInterrupt: After a signal, saying how to go on.
        """
        if self.resume_from is not None:
            trainer.progress = read_progress(self.resume_from, self.identity)
            if step_of(self.resume_from) >= trainer.stretch.num_steps:
                return self._finished(trainer, self.resume_from)
        with Interruption() as interruption:
            trainer.add_callback(interruption)
            resume_from = None if self.resume_from is None else str(self.resume_from)
            output = trainer.train(resume_from_checkpoint=resume_from)
        step = interruption.stopped_at
        if step is not None and step < trainer.stretch.num_steps:
            raise KeyboardInterrupt(
                f"after step {step} of {trainer.stretch.num_steps}, all of it saved; the same "
                "command with --resume_from_checkpoint last goes on from there"
            )
        trainer.save_model(str(self.adapter_dir))
        return output

    def _finished(self, trainer: LongTrainer, checkpoint: Path) -> TrainOutput:
        """Nothing is left to train: the Trainer would take one step too many."""
        state = read_adapter(checkpoint)
        write_state(trainer.model, state)
        self.save_adapter(self.adapter_dir, state)
        steps = trainer.stretch.num_steps
        return TrainOutput(steps, trainer.progress.loss_sum / steps, {})


class _AfterValidation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, on_validation: Callable[[int, float], None]) -> None:
        self.on_validation = on_validation

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self.on_validation(state.global_step, metrics["eval_loss"])


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

    def __enter__(self) -> "Interruption":
        """Listen, where Python allows it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt("at once, without saving")
        self.asked = True
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nfinishing this step, then saving; once more stops at once, unsaved\n")

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
