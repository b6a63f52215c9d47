"""A Trainer's steps with differential privacy for single records: its samples and gradients."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from fedfora.privacy.noise import SecretNoise
from fedfora.training.dp_sgd import (
    PoissonBatches,
    RecordPrivacy,
    check_gradients,
    collate_any,
    write_private_gradient,
)

CHECKED_ROWS = 2

# What the Trainer is told: a step is one batch, and clipping is not its affair.
TRAINER_ARGUMENTS = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}


class PrivateSteps:
    """Gives a Trainer its samples and its gradients, so that every step is a release of DP-SGD.

    A step's sample comes as one batch of whatever size; it is worked through in pieces of
    `rows_at_a_time`. Accumulation and the clipping of whole gradients are therefore off.
    """

    def __init__(self, privacy: RecordPrivacy, rows_at_a_time: int) -> None:
        self.privacy, self.rows_at_a_time = privacy, rows_at_a_time
        self.noise = SecretNoise()

    def dataloader(self, trainer: Any) -> Any:
        """Return all steps' samples, after the gradients of single rows have been checked.

        Raises:
            ValueError: If several processes train, whose noise would have to be one, or if the
                gradients of single rows are not right.
        """
        if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled:
            raise ValueError("--privacy_unit record trains in one process, without DeepSpeed")
        collate = collate_any(trainer.data_collator)
        first = collate(list(trainer.train_dataset[:CHECKED_ROWS]))
        check_gradients(trainer.model, trainer._prepare_inputs(first))
        samples = PoissonBatches(self.privacy, trainer.stretch.num_steps, self.noise)
        return DataLoader(trainer.train_dataset, batch_sampler=samples, collate_fn=collate)

    def step(self, trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Write a sample's noisy gradient into the parameters, and return its loss."""
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        loss = write_private_gradient(
            model,
            inputs,
            self.privacy,
            self.noise,
            batch_size=self.rows_at_a_time,
            context=trainer.compute_loss_context_manager,
        )
        trainer.count(inputs, loss)
        return loss
