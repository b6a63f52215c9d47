"""`fedfora train`: settings to a run directory with one trained adapter."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fedfora._seeds import derive_seed
from fedfora.adapter.state import read_state
from fedfora.data.encoding import encode_examples, prompt_format
from fedfora.data.loading import load_examples
from fedfora.models.fingerprint import describe, fingerprint
from fedfora.models.loading import add_adapter, load_base
from fedfora.models.saving import adapter_config, adapter_record, save_adapter
from fedfora.reporting.record import RunRecord, check_output_dir
from fedfora.reporting.view import View
from fedfora.training.local import LocalResult, train_locally
from fedfora.training.schedule import Stretch, num_steps
from fedfora.training.settings import TrainArguments, TrainSettings
from fedfora.training.trainer import StepReport


def train(settings: TrainSettings, view: View) -> LocalResult:
    """Train an adapter and write the run directory.

    A training is what site 0 of a federation does in its first round, to the bit.

    Raises:
        ValueError: If rows, model or settings do not work; the message names the flag.
    """
    check_output_dir(settings.run.output_dir, overwrite=settings.run.overwrite_output_dir)
    if settings.data.train_file is None:
        raise ValueError("--train_file is missing: a file, or clinic")
    examples = load_examples(settings.data.train_file, settings.data)
    base = load_base(settings.model)
    base_fingerprint = fingerprint(base)
    seed = settings.train.seed
    model = add_adapter(base, settings.adapter, seed=seed)
    prompts = prompt_format(settings.data, base.tokenizer)
    encoded = encode_examples(examples, base.tokenizer, prompts)
    steps = steps_of(settings.train, len(encoded))

    record = RunRecord(settings.run.output_dir, overwrite=settings.run.overwrite_output_dir)
    record.write_config(asdict(settings))
    record.write_environment(seed=seed, base_fingerprint=base_fingerprint, rows=len(encoded))
    view.line(f"{len(encoded)} rows, {steps} steps, {_trainable(model):,} trainable parameters")
    view.total = steps
    result = train_locally(
        model,
        base.tokenizer,
        encoded,
        settings.train,
        stretch=Stretch(first_step=0, num_steps=steps, total_steps=steps),
        seed=derive_seed(seed, "train", 0, 0),
        on_step=_Steps(view, record, steps, settings.train.logging_steps),
    )
    save_adapter(
        Path(settings.run.output_dir),
        read_state(model),
        adapter_config(model),
        adapter_record(prompts, base_fingerprint, describe(base)),
    )
    record.log("trained", **asdict(result))
    return result


def steps_of(settings: TrainArguments, num_rows: int, num_processes: int = 1) -> int:
    """Return how many optimizer steps `settings` asks for on `num_rows` rows."""
    return num_steps(
        num_rows,
        max_steps=settings.max_steps,
        num_train_epochs=settings.num_train_epochs,
        batch_size=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        num_processes=num_processes,
    )


@dataclass
class _Steps:
    """Shows every step, and records every `logging_steps`-th."""

    view: View
    record: RunRecord
    num_steps: int
    logging_steps: int

    def __post_init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, report: StepReport) -> None:
        speed = report.tokens / (time.monotonic() - self._started)
        what = f"step {report.step}/{self.num_steps}"
        self.view.advance(1, what, loss=report.loss, speed=speed)
        if report.step % self.logging_steps == 0 or report.step == self.num_steps:
            self.record.log("step", step=report.step, loss=report.loss, tokens=report.tokens)


def _trainable(model: object) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)  # type: ignore[attr-defined]
