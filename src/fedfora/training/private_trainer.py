"""The Trainer with differential privacy for single records: its samples and gradients, no more."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from fedfora.privacy.noise import SecretNoise
from fedfora.training.private_gradient import (
    PoissonBatches,
    RecordPrivacy,
    check_gradients,
    collate_any,
    write_private_gradient,
)
from fedfora.training.trainer import AdapterTrainer

CHECKED_ROWS = 2


class PrivateTrainer(AdapterTrainer):
    """`AdapterTrainer` whose every step is one release of DP-SGD.

    A step's sample comes as one batch of whatever size; it is worked through in pieces of
    `rows_at_a_time`. Accumulation and the clipping of whole gradients are therefore off.
    """

    def __init__(self, *, privacy: RecordPrivacy, rows_at_a_time: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.privacy = privacy
        self.rows_at_a_time = rows_at_a_time
        self.noise = SecretNoise()

    def get_train_dataloader(self) -> Any:
        """Return the steps' samples, after the gradients of single rows have been checked."""
        collate = collate_any(self.data_collator)
        first = collate(list(self.train_dataset[:CHECKED_ROWS]))
        check_gradients(self.model, self._prepare_inputs(first))
        batches = PoissonBatches(self.privacy, self.stretch.num_steps, self.noise)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=collate)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Write the sample's noisy gradient into the parameters."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = write_private_gradient(
            model,
            inputs,
            self.privacy,
            self.noise,
            batch_size=self.rows_at_a_time,
            context=self.compute_loss_context_manager,
        )
        self.count(inputs, loss)
        return loss


def private_arguments() -> dict[str, Any]:
    """Return what the Trainer is told when a step is one batch and clipping is our own."""
    return {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
