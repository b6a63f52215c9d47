"""transformers' Trainer for one adapter: a piece of a schedule, tokens counted, checkpoints.

PEFT's and the Trainer's own saving would write the base's configuration, pickled arguments and, of
a large base under DeepSpeed, a copy of all weights. Here only the adapter is gathered; it is read
back after every save and compared.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from fedfora.adapter.state import AdapterState, read_state, state_from_dict, write_state
from fedfora.models.losses import computed_once, token_losses
from fedfora.models.resolve import WEIGHTS
from fedfora.models.saving import read_adapter
from fedfora.protection.sealing import is_sealed
from fedfora.training.checkpoints import Progress, write_progress
from fedfora.training.dp_sgd import PrivateSteps, RecordPrivacy
from fedfora.training.packing import passes_of
from fedfora.training.schedule import StepWindow, scheduler_from
from fedfora.training.settings import TrainArguments

if TYPE_CHECKING:
    from fedfora.training.run import Training


@dataclass(frozen=True)
class StepReport:
    """Where a training stands after an optimizer step; `loss` is that of the step."""

    step: int
    loss: float
    tokens: int


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """`Trainer` that runs a piece of a longer schedule and counts the tokens it trains on.

    Its options are those of `train_locally`, and `Trainer`'s.
    """

    def __init__(
        self,
        *,
        settings: TrainArguments,
        stretch: StepWindow,
        on_step: Callable[[StepReport], None],
        run: Training | None,
        privacy: RecordPrivacy | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_dataset=run and run.prepared.validation, **kwargs)
        # What the Trainer asks of a loss that is already a mean over all batches of a step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.settings, self.stretch, self.run = settings, stretch, run
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.progress, self.started = Progress(), time.perf_counter()
        tokens = settings.max_tokens_per_pass
        self.private = None if privacy is None else PrivateSteps(privacy, tokens)
        self._step_loss: torch.Tensor | float = 0.0
        self._step_tokens = self._step_answer_tokens = 0
        self.remove_callback(PrinterCallback)
        validation = run and run.settings.validation
        if validation and (patience := validation.early_stopping_patience) is not None:
            self.add_callback(EarlyStoppingCallback(patience, validation.early_stopping_threshold))
        self.add_callback(AfterStep(self, on_step))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Build the whole schedule and start it where this stretch starts."""
        self.lr_scheduler = scheduler_from(
            optimizer or self.optimizer,
            self.stretch,
            lr_scheduler_type=self.args.lr_scheduler_type,
            warmup_ratio=self.settings.warmup_ratio,
        )
        return self.lr_scheduler

    def get_train_dataloader(self) -> Any:
        """Return the batches; with record privacy those of random samples."""
        return self.private.dataloader(self) if self.private else super().get_train_dataloader()

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Any:
        """Compute the gradients of a batch, in passes of rows of like length.

        With record privacy they are clipped and noisy ones.
        """
        if self.private:
            return self.private.step(self, model, inputs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # they count the backward passes
            return super().training_step(model, inputs, num_items_in_batch)
        *passes, last = passes_of(
            inputs,
            self.settings.max_tokens_per_pass,
            device=self.args.device.type,
            num_parameters=self.num_parameters,
            shared=computed_once(model, inputs),
        )
        loss = torch.zeros((), device=self.args.device)
        with self.accelerator.no_sync(model):
            for each in passes:
                loss += super().training_step(model, each, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the batch's part of the mean loss over all answer tokens of the step.

        Logits are computed where a token has a loss. In a validation it is the batch's own mean.
        """
        loss_N, _ = token_losses(model, inputs)
        if num_items_in_batch is None:
            loss = loss_N.mean()
        else:  # the processes' gradients are averaged, and the count is that of all of them
            loss = loss_N.sum() / num_items_in_batch * self.args.world_size
        if model.training:
            self.count(inputs, loss.detach())
        return (loss, {}) if return_outputs else loss

    def count(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """Add a batch's tokens and its part of the step's loss."""
        self._step_tokens += int(inputs["attention_mask"].sum())
        self._step_answer_tokens += int((inputs["labels"][:, 1:] != -100).sum())
        self._step_loss = self._step_loss + loss

    def finish_step(self) -> float:
        """Add the step's counts to the progress and return its loss, over all processes."""
        sums = [float(self._step_loss), self._step_tokens, self._step_answer_tokens]
        self._step_loss, self._step_tokens, self._step_answer_tokens = 0.0, 0, 0
        if self.args.world_size > 1:
            shares = torch.tensor(sums, dtype=torch.float64, device=self.args.device)
            sums = self.accelerator.reduce(shares, "sum").tolist()
            sums[0] /= self.args.world_size  # each process's loss is scaled by their number
        loss, tokens, answer_tokens = sums
        self.progress.loss_sum += loss
        self.progress.tokens += int(tokens)
        self.progress.answer_tokens += int(answer_tokens)
        return loss

    # Saving and loading: called only where a training has checkpoints.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, gathered from all processes, and read it back.

        Raises:
            ValueError: If it is not finite, cannot be written, or what was read back is not what
                was trained.
        """
        assert self.run is not None
        directory = Path(output_dir or self.args.output_dir)
        state = gather_adapter(self)
        if not self.args.should_save:
            return
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(
                f"the training has diverged: {broken[0]} holds numbers that are not finite; lower "
                f"--learning_rate ({self.args.learning_rate}); this step was not saved"
            )
        try:
            self.run.save(directory, state)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"--output_dir: {directory} cannot be written: {error}") from error
        check_saved(directory, state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, then the file that says it is whole, then remove the oldest."""
        assert self.run is not None
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seconds = self.progress.seconds + time.perf_counter() - self.started
                bytes_now = self.run.metrics_bytes()
                now = replace(self.progress, seconds=seconds, metrics_bytes=bytes_now)
                write_progress(directory, now, self.run.identity)
        except ValueError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        except (OSError, RuntimeError) as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise ValueError(
                f"--output_dir: {directory} cannot be written: {error}; the partial checkpoint "
                "was removed, earlier ones are unchanged"
            ) from error
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.run.settings.checkpoint.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_sealed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_sealed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_sealed(self, checkpoint: str | None) -> bool:
        """Read the adapter of a checkpoint into the model, if it is sealed; return whether."""
        if checkpoint is None or not is_sealed(Path(checkpoint) / WEIGHTS):
            return False
        write_state(self.model, read_adapter(checkpoint))
        return True

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Let this run's own intervals hold, not those stored in the checkpoint."""
        state = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return state


class AfterStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Reports every optimizer step and every validation."""

    def __init__(self, trainer: Any, on_step: Callable[[StepReport], None]) -> None:
        self.trainer, self.on_step = trainer, on_step

    def on_step_end(self, _: Any, state: Any, __: Any, **kwargs: Any) -> None:
        """Report the step and start the next one's loss at zero."""
        loss = self.trainer.finish_step()
        self.on_step(StepReport(state.global_step, loss, self.trainer.progress.tokens))

    def on_evaluate(
        self, _: Any, state: Any, __: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Report a validation."""
        if self.trainer.run is not None:
            self.trainer.run.on_validation(state.global_step, metrics["eval_loss"])


def check_saved(directory: Path, state: AdapterState) -> None:
    """Raise unless the adapter in a directory is exactly `state`, and whole.

    Raises:
        ValueError: Naming the first factor that is empty or of another norm.
    """
    saved = read_adapter(directory)
    for name, tensor in state.items():
        norm, again = float(tensor.norm()), float(saved[name].norm())
        if tensor.numel() == 0 or norm != again:
            raise ValueError(
                f"{directory}: {name} has norm {again} and shape {tuple(saved[name].shape)} in the "
                f"file, {norm} and {tuple(tensor.shape)} in memory: the adapter was not saved "
                "whole"
            )


def gather_adapter(trainer: Any) -> AdapterState:
    """Return all factors, whole, on the CPU; every process of the training must call this.

    Under DeepSpeed ZeRO-3 only the adapter's weights are gathered, under FSDP the model's. In all
    other cases every process has the whole adapter.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if plugin is not None and plugin.zero_stage == 3:
        import deepspeed

        adapter = [p for p in trainer.model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(adapter):
            return read_state(trainer.model)
    if trainer.is_fsdp_enabled:
        return state_from_dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
    return read_state(trainer.accelerator.unwrap_model(trainer.model))
