"""transformers' Trainer for one adapter: a stretch of a schedule, tokens counted, rows in order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from fedfora.models.losses import token_losses
from fedfora.training.dp_sgd import PrivateSteps
from fedfora.training.packing import passes_of
from fedfora.training.schedule import StepWindow, scheduler_from


@dataclass(frozen=True)
class StepReport:
    """Where a training stands after an optimizer step; `loss` is that of the step."""

    step: int
    loss: float
    tokens: int


@dataclass
class Progress:
    """What a training has seen so far, over all processes.

    Args:
        tokens: Tokens read, padding left out.
        answer_tokens: Tokens with a loss.
        loss_sum: The steps' losses, added up.
        seconds: Wall time of earlier pieces of the same training.
        metrics_bytes: Length of metrics.jsonl after the last step counted here.
    """

    tokens: int = 0
    answer_tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    metrics_bytes: int = 0


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """`Trainer` that runs a stretch of a longer schedule and counts the tokens it trains on."""

    def __init__(
        self,
        *,
        stretch: StepWindow,
        warmup_ratio: float,
        group_by_length: bool = False,
        max_tokens_per_pass: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # What the Trainer asks of a loss that is already a mean over all batches of a step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.max_tokens_per_pass = max_tokens_per_pass
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.group_by_length = group_by_length
        self._grouped: GroupedByLength | None = None
        self.stretch = stretch
        self.warmup_ratio = warmup_ratio
        self.progress = Progress()
        self.private: PrivateSteps | None = None
        self._step_loss: torch.Tensor | float = 0.0
        self._step_tokens = self._step_answer_tokens = 0

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Build the whole schedule and start it where this stretch starts."""
        self.lr_scheduler = scheduler_from(
            optimizer or self.optimizer,
            self.stretch,
            lr_scheduler_type=self.args.lr_scheduler_type,
            warmup_ratio=self.warmup_ratio,
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
            self.max_tokens_per_pass,
            device=self.args.device.type,
            num_parameters=self.num_parameters,
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
        self._step_tokens += _num_tokens(inputs)
        self._step_answer_tokens += int((inputs["labels"][:, 1:] != -100).sum())
        self._step_loss = self._step_loss + loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Group rows of like length where that is asked for; otherwise as the Trainer does."""
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.world_size
        self._grouped = GroupedByLength(
            [len(row["input_ids"]) for row in self.train_dataset], together, self.args.seed
        )
        return self._grouped

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        """Tell the sampler which pass this is; the Trainer does not reach it in all cases."""
        if self._grouped is not None:
            self._grouped.epoch = epoch
        super()._run_epoch(epoch=epoch, **kwargs)

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


def _num_tokens(inputs: dict[str, Any]) -> int:
    """Tokens that are no padding; packed batches have none, and no mask."""
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


class AfterStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Reports every optimizer step."""

    def __init__(self, trainer: AdapterTrainer, on_step: Callable[[StepReport], None]) -> None:
        self.trainer, self.on_step = trainer, on_step

    def on_step_end(self, _: Any, state: Any, __: Any, **kwargs: Any) -> None:
        """Report the step and start the next one's loss at zero."""
        loss = self.trainer.finish_step()
        self.on_step(StepReport(state.global_step, loss, self.trainer.progress.tokens))


# The order of rows by length: rows of like length in a batch, so that little is padded.


class GroupedByLength(Sampler[int]):
    """Rows at random, but batches of like length; the same order for the same seed and epoch.

    transformers' own sampler draws from the global generator, so that a training resumed in a later
    pass over the rows would see another order.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows that should be of like length.
        seed: Seed of the order.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
