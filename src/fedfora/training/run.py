"""`fedfora train`: settings to a run directory with one trained adapter."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedfora.adapter.state import AdapterState
from fedfora.data.canaries import planted
from fedfora.data.encoding import (
    Encoded,
    PromptFormat,
    check_context,
    encode_examples,
    prompt_format_of,
)
from fedfora.data.loading import shared_instruction
from fedfora.models.adapter_base import add_adapter, start_note
from fedfora.models.fingerprint import describe, fingerprint, fingerprint_of_rows
from fedfora.models.loading import Base, context_length, load_base
from fedfora.models.resolve import read_record
from fedfora.models.saving import adapter_config, adapter_record, save_adapter
from fedfora.registry import counted
from fedfora.reporting.record import RunRecord, append_event, check_disk_space
from fedfora.reporting.report import finish_run
from fedfora.reporting.view import View
from fedfora.seeds import derive_seed
from fedfora.training.checkpoints import (
    Progress,
    identity_of,
    read_progress,
    remove_checkpoints,
    step_of,
)
from fedfora.training.launch import Processes, start_processes
from fedfora.training.local import LocalResult, check_trainable, train_locally, training_rows
from fedfora.training.preflight import (
    LOCAL,
    Rows,
    checkpoints_of,
    ledger_of,
    place_of,
    read_rows,
    reports,
)
from fedfora.training.privacy_plan import (
    PaySteps,
    PrivateTraining,
    plan_private_training,
    with_learning_rate,
)
from fedfora.training.schedule import StepWindow, num_steps
from fedfora.training.settings import NO_EFFECT, TrainSettings
from fedfora.training.trainer import StepReport


@dataclass(frozen=True)
class Prepared:
    """What a training needs, loaded and checked; nothing has been written yet."""

    base: Base
    model: Any
    prompts: PromptFormat
    instruction: str | None
    base_fingerprint: str
    encoded: Encoded
    validation: Encoded | None
    steps: int
    ledger: str


def train(settings: TrainSettings, view: View, rows: Rows | None = None) -> LocalResult:
    """Train an adapter and write the run directory.

    A training is what site 0 of a federation does in its first round, to the bit. Started by
    torchrun, accelerate or deepspeed, all processes share the rows, and the first one writes.

    Raises:
        ValueError: If rows, model or settings do not work; the message names the flag.
        KeyboardInterrupt: After Ctrl-C, when the step is finished and saved.
    """
    processes = start_processes(settings)
    resume_from, resumes_here, overwrite = place_of(settings)
    report_to = reports(settings.launch.report_to)
    prepared = prepare(settings, processes, rows or read_rows(settings))
    identity = identity_of(
        asdict(settings),
        base_fingerprint=prepared.base_fingerprint,
        rows_fingerprint=fingerprint_of_rows(prepared.encoded),
        num_processes=processes.number,
    )
    earlier = Progress() if resume_from is None else read_progress(resume_from, identity)
    first_step = 0 if resume_from is None else step_of(resume_from)
    private = _plan_privacy(settings, prepared, first_step)
    # The adapter, and for each checkpoint the adapter and two moments; the newest comes first.
    num_checkpoints = (settings.checkpoint.save_total_limit or 1) + 1
    needed_bytes = 4 * _trainable(prepared.model) * (1 + 3 * num_checkpoints)
    check_disk_space(settings.run.output_dir, needed_bytes)
    chosen = with_learning_rate(
        settings.train, settings.privacy, settings.adapter, prepared.model, prepared.steps
    )
    if processes.number > 1:
        torch.distributed.barrier()
    training = Training(settings, prepared, identity, private, resume_from, report_to)
    if processes.index == 0:  # all checks are behind: now an earlier run may go
        kept = earlier.metrics_bytes if resumes_here else None
        record = training.begin(view, overwrite=overwrite, kept_bytes=kept)
        view.line(_headline(prepared, processes, first_step))
        if private is not None:
            warm = settings.adapter.start_adapter is not None
            trained = _trainable(prepared.model)
            expected = private.outlook(trained, num_steps=prepared.steps, public_start=warm)
            view.line(f"learning rate {chosen.learning_rate:.3g}\n{expected}")
        tokens = 0 if private else earlier.tokens
        record.log("started", steps=prepared.steps, step=first_step, tokens=tokens)
    result = train_locally(
        prepared.model,
        prepared.encoded,
        chosen,
        stretch=StepWindow(first_step=0, num_steps=prepared.steps, total_steps=prepared.steps),
        seed=derive_seed(settings.train.seed, "train", 0, 0),
        callbacks=[PaySteps(private, settings.checkpoint.save_steps)] if private else [],
        on_step=training.on_step,
        run=training,
        privacy=private.privacy if private else None,
    )
    training.finish(result, view)
    return result


@dataclass
class Training:
    """One training: how it is kept, validated, reported and resumed.

    A checkpoint must agree on `identity` with the training that resumes from it. Only the first
    process has a `record`.

    With record privacy, losses, counts and checkpoints stay in the directory `LOCAL` of the run.
    """

    settings: TrainSettings
    prepared: Prepared
    identity: dict[str, Any]
    private: PrivateTraining | None
    resume_from: Path | None
    report_to: list[str]
    record: RunRecord | None = None

    def begin(self, view: View, *, overwrite: bool, kept_bytes: int | None) -> RunRecord:
        """Open the run directory, and write settings, versions and fingerprints.

        `kept_bytes` of the metrics stay where a run is resumed in it. Checkpoints that are no part
        of this training go.
        """
        output_dir, heard = self.settings.run.output_dir, [view.take]
        self.record = record = RunRecord(
            output_dir, overwrite=overwrite, listeners=heard, kept_bytes=kept_bytes
        )
        if self.private is not None:
            (record.directory / LOCAL).mkdir(exist_ok=True)
        remove_checkpoints(checkpoints_of(self.settings), keep_up_to=self.resume_from)
        record.write_config(asdict(self.settings), NO_EFFECT)
        record.write_environment(
            seed=self.settings.train.seed,
            base_fingerprint=self.prepared.base_fingerprint,
            rows_fingerprint=None if self.private else self.identity["rows_fingerprint"],
            rows=len(self.prepared.encoded),
            num_processes=self.identity["num_processes"],
        )
        return record

    def on_step(self, report: StepReport) -> None:
        """Show a step; record every `logging_steps`-th, at least ten in all, and the last."""
        if self.record is None:
            return
        steps, every = self.prepared.steps, self.settings.train.logging_steps
        recorded = report.step % min(every, math.ceil(steps / 10)) == 0 or report.step == steps
        if recorded and self.private is None:
            self.record.log("step", **asdict(report))
            return
        if recorded:
            append_event(self.record.directory / LOCAL, "step", **asdict(report))
        self.record.tell({"event": "step", **asdict(report)})

    def on_validation(self, step: int, loss: float) -> None:
        """Record a validation."""
        if self.record is not None:
            self.record.log("validation", step=step, loss=loss)

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl."""
        return 0 if self.record is None else self.record.metrics_bytes()

    def trainer_arguments(self) -> dict[str, Any]:
        """Return for transformers where and when to save, evaluate and report, and DeepSpeed's."""
        settings, validation = self.settings, self.settings.validation
        arguments: dict[str, Any] = {
            "output_dir": str(checkpoints_of(settings)),
            "save_strategy": "steps",
            "save_steps": settings.checkpoint.save_steps,
            "report_to": self.report_to,
            "deepspeed": settings.launch.deepspeed,
            "restore_callback_states_from_checkpoint": True,
        }
        if self.prepared.validation is not None:
            arguments |= {
                "eval_strategy": "steps",
                "eval_steps": validation.eval_steps or settings.checkpoint.save_steps,
                "per_device_eval_batch_size": validation.per_device_eval_batch_size,
                "metric_for_best_model": "eval_loss",
                "greater_is_better": False,
                "load_best_model_at_end": validation.keeps_best,
            }
        return arguments

    def save(self, directory: Path, state: AdapterState) -> None:
        """Save an adapter with the guarantee for what has been released until now."""
        private, prepared = self.private, self.prepared
        record = adapter_record(
            prepared.prompts,
            prepared.base_fingerprint,
            base=describe(prepared.base),
            # With a digest, somebody who knows all rows but one could find that row.
            rows_fingerprint=None if private else self.identity["rows_fingerprint"],
            instruction=None if private else prepared.instruction,
            privacy=None if private is None else private.statement,
        )
        save_adapter(directory, state, adapter_config(prepared.model), record)

    def finish(self, result: LocalResult, view: View) -> None:
        """Record what came out, and write the run's results."""
        if self.record is None:
            return
        if self.private is None:
            self.record.log("trained", **asdict(result))
        else:
            append_event(self.record.directory / LOCAL, "trained", **asdict(result))
            self.record.log("trained", steps=result.steps)
            self.record.log("privacy", **self.private.event())
            view.line(self.private.statement)
        finish_run(self.record)


def prepare(settings: TrainSettings, processes: Processes, rows: Rows) -> Prepared:
    """Load the base, put the adapter on it, encode the rows; check all of it."""
    data, seed = settings.data, settings.train.seed
    examples, held_out = [*rows.examples, *planted(data, site=0, seed=seed)], rows.held_out
    base = load_base(settings.model)
    base_fingerprint = fingerprint(base)
    model = add_adapter(base, settings.adapter, seed=seed)
    prompts = prompt_format_of(data, base.tokenizer)
    encoded = encode_examples(
        examples,
        base.tokenizer,
        prompts,
        cache_dir=settings.model.cache_dir,
        overwrite=data.overwrite_cache,
        num_workers=data.preprocessing_num_workers,
    )
    validation = None if held_out is None else encode_examples(held_out, base.tokenizer, prompts)
    for rows_read, source in (
        (encoded, data.train_file or data.dataset),
        (validation or [], settings.validation.validation_file),
    ):
        lengths = [len(row["input_ids"]) for row in rows_read]
        check_context(context_length(base.model.config), lengths, str(source))
    check_trainable(model, base.tokenizer, settings.train, settings.privacy)
    count = len(training_rows(encoded, settings.train))
    steps = num_steps(settings.train, settings.privacy, count, processes.number)
    told, ledger = shared_instruction(rows.examples), ledger_of(rows.examples)
    return Prepared(
        base, model, prompts, told, base_fingerprint, encoded, validation, steps, ledger
    )


def _plan_privacy(
    settings: TrainSettings, prepared: Prepared, first_step: int
) -> PrivateTraining | None:
    """Return how records are hidden, if they are; nothing is spent before the first step."""
    private = plan_private_training(
        settings.privacy,
        settings.train,
        output_dir=settings.run.output_dir,
        ledger=prepared.ledger,
        num_rows=len(prepared.encoded),
        first_step=first_step,
        total_steps=prepared.steps,
    )
    if private is not None and (start := settings.adapter.start_adapter) is not None:
        if read_record(start).get("rows_fingerprint") == fingerprint_of_rows(prepared.encoded):
            raise ValueError(
                f"--start_adapter {start} was trained on these rows without privacy; a training "
                "from it hides none of them"
            )
        private = replace(private, note=start_note(settings.adapter))
    return private


def _headline(prepared: Prepared, processes: Processes, first_step: int) -> str:
    where = f" from step {first_step}" if first_step else ""
    shared = f", {processes.number} processes" if processes.number > 1 else ""
    return (
        f"{counted(len(prepared.encoded), 'row')}, {counted(prepared.steps, 'step')}{where}, "
        f"{_trainable(prepared.model):,} trainable parameters{shared}"
    )


def _trainable(model: Any) -> int:
    trained = (p for p in model.parameters() if p.requires_grad)
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in trained)  # ZeRO-3 shares p out
