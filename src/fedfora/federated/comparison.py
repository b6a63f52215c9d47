"""What federating brings: the base, every site alone, the federation, and central training.

All of them start from the same adapter and answer the same test rows. A site alone takes as many
steps as it takes in the federation; central training takes as many on the pooled rows, each step on
as many rows as all sites together.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedfora.adapter.state import fold
from fedfora.data.encoding import Encoded
from fedfora.data.loading import Example, load_examples
from fedfora.evaluation.evaluate import evaluate
from fedfora.federated.preflight import num_test_rows, site_names, work_of
from fedfora.federated.settings import FederationSettings
from fedfora.federated.simulation import simulate
from fedfora.federated.site_runtime import SiteRuntime, load_runtime, open_site
from fedfora.models.saving import read_adapter
from fedfora.reporting.record import append_event, peak_memory_bytes, reset_peak_memory
from fedfora.reporting.report import write_results
from fedfora.reporting.view import EVALUATED_ROW, View, clock
from fedfora.seeds import derive_seed
from fedfora.training.schedule import StepWindow
from fedfora.training.trainer import StepReport


@dataclass(frozen=True)
class Row:
    """One way of training, and what it came to.

    Args:
        name: A site's name, or the kind.
        kind: "base", "alone", "federated" or "central".
        scores: On the test rows.
        predictions: The answers to the test rows.
        peak_memory_bytes: Of the process, while it trained and answered.
        seconds: Wall time of both.
    """

    name: str
    kind: str
    scores: dict[str, Any]
    predictions: list[str]
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All rows, the test rows they answered, and what a site sent in a round."""

    base: Row
    alone: dict[str, Row]
    federated: Row
    central: Row
    examples: list[Example]
    uplink_bytes_per_round_and_site: int
    seconds: float


def work_of_comparison(settings: FederationSettings) -> float:
    """Return the work of `compare`, in optimizer steps, for the view's total."""
    num_sites, num_steps = len(site_names(settings)), _num_steps(settings)
    evaluations = (num_sites + 2) * num_test_rows(settings) * EVALUATED_ROW
    return work_of(settings) + 2 * num_sites * num_steps + evaluations


def compare(settings: FederationSettings, view: View) -> Comparison:
    """Run all four, add them to the run's record, and return their rows.

    Raises:
        ValueError: If there are no test rows, or the settings do not work.
    """
    if settings.data.test_file is None:
        raise ValueError("--test_file is missing: a comparison needs held-out rows")
    started = time.monotonic()
    examples = load_examples(settings.data.test_file, settings.data)
    examples = examples[: settings.evaluation.max_eval_samples]
    runtime = load_runtime(settings.run_config())
    sites = [open_site(runtime, i) for i in range(len(site_names(settings)))]
    rounds: list[dict[str, Any]] = []

    def measure(kind: str, prepare: Callable[[], object], name: str | None = None) -> Row:
        return _measured(name or kind, kind, prepare, runtime, examples, view)

    def federate() -> None:
        rounds.extend(simulate(settings, view))
        runtime.load(fold(read_adapter(settings.run.output_dir)))

    base = measure("base", lambda: runtime.load(runtime.fresh))
    federated = measure("federated", federate)
    alone = {
        site.name: measure(
            "alone", partial(_train, runtime, site.encoded, site.name, view), site.name
        )
        for site in sites
    }
    pooled = [row for site in sites for row in site.encoded]
    central = measure(
        "central", partial(_train, runtime, pooled, "central", view, batches=len(sites))
    )
    directory = Path(settings.run.output_dir)
    _record(directory, [base, *alone.values(), federated, central])
    return Comparison(
        base=base,
        alone=alone,
        federated=federated,
        central=central,
        examples=examples,
        uplink_bytes_per_round_and_site=rounds[-1]["sites"][0]["uplink_bytes"],
        seconds=time.monotonic() - started,
    )


def _record(directory: Path, rows: list[Row]) -> None:
    """Add the rows to the run's record, and write card and report anew with them."""
    for row in rows:
        append_event(
            directory,
            "row",
            name=f"{row.name}, alone" if row.kind == "alone" else row.name,
            kind=row.kind,
            scores=row.scores,
            peak_memory_bytes=row.peak_memory_bytes,
            wall_seconds=round(row.seconds, 3),
        )
    write_results(directory)


def _measured(
    name: str,
    kind: str,
    prepare: Callable[[], object],
    runtime: SiteRuntime,
    examples: list[Example],
    view: View,
) -> Row:
    """Let `prepare` leave the model as it is to be judged; judge it, and measure both."""
    reset_peak_memory()
    started = time.monotonic()
    prepare()
    evaluation = runtime.settings.evaluation
    result = evaluate(
        runtime.model,
        runtime.base.tokenizer,
        examples,
        runtime.prompts,
        batch_size=evaluation.per_device_eval_batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        on_batch=lambda rows: view.advance(rows * EVALUATED_ROW, f"{name}: evaluation"),
    )
    seconds = time.monotonic() - started
    what = f"{name} alone" if kind == "alone" else name
    view.line(f"{what:24s} F1 {result.scores['f1']:.3f}   {clock(seconds)}")
    return Row(name, kind, result.scores, result.predictions, peak_memory_bytes(), seconds)


def _train(
    runtime: SiteRuntime, encoded: Encoded, name: str, view: View, *, batches: int = 1
) -> None:
    """Train the fresh adapter as long as the federation does, `batches` times the rows per step."""
    train = runtime.settings.train
    num_steps = _num_steps(runtime.settings)
    started = time.monotonic()

    def show(report: StepReport) -> None:
        speed = report.tokens / (time.monotonic() - started)
        what = f"{name} step {report.step}/{num_steps}"
        view.advance(batches, what, loss=report.loss, speed=speed)

    runtime.train(
        runtime.fresh,
        encoded,
        replace(train, gradient_accumulation_steps=batches * train.gradient_accumulation_steps),
        stretch=StepWindow(first_step=0, num_steps=num_steps, total_steps=num_steps),
        seed=derive_seed(train.seed, "train", name),
        on_step=show,
    )


def _num_steps(settings: FederationSettings) -> int:
    return settings.federation.num_rounds * settings.federation.local_steps
