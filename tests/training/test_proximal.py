"""FedProx's pull, on a model whose trajectory is known by hand."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from fedfora.training.proximal import ProximalTerm


class Line(nn.Module):
    """Loss = w x, so its gradient is x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return {"loss": (self.w * x).mean()}


@pytest.mark.parametrize(("accumulation", "mu"), [(1, 0.5), (4, 0.5), (1, 0.0)])
def test_steps_follow_the_gradient_of_the_whole_objective(tmp_path, accumulation, mu):
    model = Line()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = [{"x": torch.tensor(2.0)}] * 12
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[ProximalTerm(mu)]).train()
    expected = 1.0
    for _ in range(3):
        expected -= 0.1 * (2.0 + mu * (expected - 1.0))
    assert model.w.item() == pytest.approx(expected, rel=1e-6)
