"""The training loop: schedules that start in the middle, token counts, accumulation."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from fedfora.adapter.state import fold, read_state
from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.models.adapter_base import add_adapter
from fedfora.models.loading import load_base
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.training.local import ProximalTerm, train_locally
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments


@pytest.fixture
def setup(tiny_dir):
    base = load_base(ModelArguments(model_name_or_path=tiny_dir, quantization="none"))
    model = add_adapter(base, AdapterArguments(lora_rank=2), seed=1)
    examples = load_examples("clinic", DataArguments())[:16]
    prompts = prompt_format_of(DataArguments(), base.tokenizer)
    return base, model, encode_examples(examples, base.tokenizer, prompts)


def run(setup, settings, stretch, **options):
    _base, model, encoded = setup
    return train_locally(model, encoded, settings, stretch=stretch, seed=5, **options)


def test_training_lowers_the_loss_and_leaves_the_base_alone(setup):
    _base, model, _ = setup
    frozen = {n: p.clone() for n, p in model.named_parameters() if "fora_" not in n}
    losses = []
    settings = TrainArguments(learning_rate=1e-2, per_device_train_batch_size=8)
    run(setup, settings, StepWindow(0, 8, 8), on_step=lambda report: losses.append(report.loss))
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_tokens_are_counted_once_each(setup):
    """Two steps of 2 x 4 rows are one pass over 16 rows: every token once, no padding."""
    *_, encoded = setup
    settings = TrainArguments(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    result = run(setup, settings, StepWindow(0, 2, 2))
    assert result.steps == 2
    assert result.tokens == sum(len(row["input_ids"]) for row in encoded)
    assert result.answer_tokens == sum(label != -100 for row in encoded for label in row["labels"])


def test_accumulating_gives_the_same_step_as_one_large_batch(setup):
    """Eight batches of one equal one batch of eight, whatever the rows' lengths."""
    _, model, encoded = setup
    setup = (*setup[:2], encoded[:8])
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    ends = []
    for batch, accumulation in ((8, 1), (1, 8)):
        for name, p in model.named_parameters():
            p.data.copy_(start[name])
        settings = TrainArguments(
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        run(setup, settings, StepWindow(0, 3, 3))
        ends.append(fold(read_state(model)))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_two_stretches_walk_the_same_schedule_as_one(setup, schedule, monkeypatch):
    """The learning rates of steps 0-3 and 4-9, taken apart, are those of steps 0-9."""
    from transformers import Trainer

    rates = []
    original = Trainer.training_step

    def spy(self, *args, **kwargs):
        rates.append(self.lr_scheduler.get_last_lr()[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", spy)
    settings = TrainArguments(
        lr_scheduler_type=schedule, warmup_ratio=0.2, gradient_accumulation_steps=1
    )
    run(setup, settings, StepWindow(0, 10, 10))
    whole = list(rates)
    rates.clear()
    run(setup, settings, StepWindow(0, 4, 10))
    run(setup, settings, StepWindow(4, 6, 10))
    assert rates == pytest.approx(whole)
    assert len(set(whole)) > 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", -1),
        ("warmup_ratio", 1.0),
        ("max_steps", 0),
        ("num_train_epochs", 0),
        ("logging_steps", 0),
    ],
)
def test_settings_out_of_range_name_their_flag(field, value):
    with pytest.raises(ValueError, match=f"--{field}"):
        TrainArguments(**{field: value})


# FedProx's pull, on a model whose trajectory is known by hand.


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
