"""The Trainer of `train`: the same steps, with checkpoints to go on from.

PEFT's and the Trainer's own saving would write the base's configuration, pickled arguments and, of
a large base under DeepSpeed, a copy of all weights. Here only the adapter is gathered; it is read
back after every save and compared.
"""

import io
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from fedfora.adapter.state import AdapterState, read_state, state_from_dict, write_state
from fedfora.models.saving import WEIGHTS, read_adapter
from fedfora.protection.keys import encryption_key
from fedfora.protection.sealing import is_sealed, read_bytes, write_bytes
from fedfora.training.checkpoints import write_progress
from fedfora.training.trainer import AdapterTrainer, Progress

SaveAdapter = Callable[[Path, AdapterState], None]


class LongTrainer(AdapterTrainer):
    """`AdapterTrainer` that writes checkpoints; each is whole or is not used.

    Args:
        save_adapter: Writes the adapter's files into a directory.
        save_total_limit: Checkpoints to keep; None for all.
        identity: What a checkpoint must agree on with the training that goes on from it.
        metrics_bytes: Returns the length of metrics.jsonl.
    """

    def __init__(
        self,
        *,
        save_adapter: SaveAdapter,
        save_total_limit: int | None,
        identity: Mapping[str, Any],
        metrics_bytes: Callable[[], int],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_adapter = save_adapter
        self.save_total_limit = save_total_limit
        self.identity = identity
        self.metrics_bytes = metrics_bytes
        self.started = time.perf_counter()
        self.seals = encryption_key() is not None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, gathered from all processes, and read it back.

        Raises:
            ValueError: If it is not finite, cannot be written, or what was read back is not what
                was trained.
        """
        directory = Path(output_dir or self.args.output_dir)
        state = gather_adapter(self)
        if not self.args.should_save:
            return
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(
                f"the training has diverged: {broken[0]} holds numbers that are not finite; lower "
                f"--learning_rate ({self.args.learning_rate}); nothing was saved of this step"
            )
        try:
            self.save_adapter(directory, state)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"--output_dir: {directory} cannot be written: {error}") from error
        check_saved(directory, state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, then the file that says it is whole, then remove the oldest."""
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_progress(directory, self.progress_now(), self.identity)
        except ValueError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        except (OSError, RuntimeError) as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise ValueError(
                f"--output_dir: {directory} cannot be written: {error}; nothing of it was left, "
                "earlier checkpoints are as they were"
            ) from error
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.seals:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_sealed_state(output_dir, self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and has_sealed_state(checkpoint):
            load_sealed_state(checkpoint, self.optimizer, self.lr_scheduler)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sealed(Path(resume_from_checkpoint) / WEIGHTS):
            write_state(self.model, read_adapter(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and is_sealed(Path(best) / WEIGHTS):
            write_state(self.model, read_adapter(best))
        else:
            super()._load_best_model()

    def progress_now(self) -> Progress:
        """Return the progress with the time and the record until now."""
        seconds = self.progress.seconds + time.perf_counter() - self.started
        return replace(self.progress, seconds=seconds, metrics_bytes=self.metrics_bytes())

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Let this run's own intervals hold, not those stored in the checkpoint."""
        state = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return state


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


# What a training goes on from, on a machine with an encryption key: never plain on a disk.
#
# The optimizer's moments are sums of gradients, and tell of the rows what gradients tell. They are
# written as torch writes them, into memory, sealed, and read back by the loader that runs no code.


OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


def has_sealed_state(checkpoint: str | Path) -> bool:
    """Tell whether a checkpoint's optimizer is sealed."""
    return is_sealed(Path(checkpoint) / OPTIMIZER)


def save_sealed_state(checkpoint: str | Path, optimizer: Any, scheduler: Any) -> None:
    """Write the states of optimizer and schedule, sealed."""
    for name, owner in ((OPTIMIZER, optimizer), (SCHEDULER, scheduler)):
        buffer = io.BytesIO()
        torch.save(owner.state_dict(), buffer)
        write_bytes(Path(checkpoint) / name, buffer.getvalue())


def load_sealed_state(checkpoint: str | Path, optimizer: Any, scheduler: Any) -> None:
    """Let optimizer and schedule go on from what `save_sealed_state` wrote.

    Raises:
        ValueError: If the key is missing or another one, or a file was changed.
    """
    for name, owner in ((OPTIMIZER, optimizer), (SCHEDULER, scheduler)):
        content = read_bytes(Path(checkpoint) / name)
        owner.load_state_dict(
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        )


# The adapter of a model whose weights lie in several processes, as one state on the CPU.


def gather_adapter(trainer: Any) -> AdapterState:
    """Return all factors, whole; every process of the training must call this.

    Under DeepSpeed ZeRO-3 only the adapter's weights are gathered, under FSDP the model's, on the
    CPU. In all other cases every process has the whole adapter.

    Args:
        trainer: A `Trainer` that has been prepared for its processes.
    """
    if trainer.is_deepspeed_enabled and _zero_stage(trainer) == 3:
        import deepspeed

        adapter = [p for p in trainer.model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(adapter):
            return read_state(trainer.model)
    if trainer.is_fsdp_enabled:
        return state_from_dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
    return read_state(trainer.accelerator.unwrap_model(trainer.model))


def _zero_stage(trainer: Any) -> int:
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage)
