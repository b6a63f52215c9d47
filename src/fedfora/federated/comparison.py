"""What a federation gains: the base, every site alone, the federation, and central training.

All of them start from the same adapter and answer the same test rows. A site alone takes as many
steps as it takes in the federation; central training takes as many on the pooled rows, each step on
as many rows as all sites together. Neither knows privacy or secure aggregation.

Where sites are the values of a column, test rows have such a value too: each arm is scored on every
site's own kind of rows as well.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedfora.adapter.state import fold
from fedfora.data.encoding import Encoded
from fedfora.evaluation.output import PREDICTIONS
from fedfora.federated.coordinator.judging import own_kind_of_rows
from fedfora.federated.preflight import scored_rows, site_rows
from fedfora.federated.settings import FederationSettings
from fedfora.federated.simulation import simulate
from fedfora.federated.site_runtime import SiteRuntime, load_runtime, open_site
from fedfora.metrics import headlines
from fedfora.models.saving import read_adapter
from fedfora.reporting.history import read_lines
from fedfora.reporting.record import (
    METRICS,
    Event,
    append_event,
    peak_memory_bytes,
    reset_peak_memory,
    write_text,
)
from fedfora.reporting.report import write_results
from fedfora.reporting.view import EVALUATED_ROW, View, clock
from fedfora.reporting.wording import label, number
from fedfora.seeds import derive_seed
from fedfora.training.schedule import StepWindow
from fedfora.training.trainer import StepReport


@dataclass(frozen=True)
class Row:
    """One way of training and its results: scores and answers on the test rows.

    Args:
        name: A site's name, or the kind.
        kind: "base", "alone", "federated" or "central".
        groups: The scores on each site's own kind of test rows, by the site's name.
        peak_memory_bytes: Of the process, while it trained and answered.
        seconds: Wall time of both.
    """

    name: str
    kind: str
    scores: dict[str, Any]
    predictions: list[str]
    peak_memory_bytes: int
    seconds: float
    groups: dict[str, dict[str, Any]]


def compare(
    settings: FederationSettings, view: View, own_rows: dict[str, int] | None = None
) -> list[Row]:
    """Run the federation and the arms of `--compare`, add them to the record, return their rows.

    Without arms it is `simulate` alone.

    Raises:
        ValueError: If the settings do not work, or the test rows have no answers.
    """
    arms, directory = settings.federation.compare, Path(settings.run.output_dir)
    if not arms:
        simulate(settings, view, own_rows)
        return []
    runtime, examples = load_runtime(settings.run_config()), scored_rows(settings)
    sites = [open_site(runtime, i) for i in range(len(site_rows(settings)))]
    names = [site.name for site in sites]
    groups = own_kind_of_rows(settings.federation.partition, examples, names)
    measured: list[Row] = []

    def measure(kind: str, prepare: Callable[[], object], name: str | None = None) -> None:
        """Let `prepare` bring the model into the state to judge; judge it, and measure both."""
        name, started = name or kind, time.monotonic()
        reset_peak_memory()
        prepare()
        told = partial(view.advance, what=f"{name}: evaluation")
        result = runtime.evaluate(examples, lambda rows: told(rows * EVALUATED_ROW))
        seconds, what = time.monotonic() - started, f"{name} alone" if kind == "alone" else name
        if not (names := headlines(result.scores)):
            raise ValueError("--compare: the test rows have no answers to score")
        score_text = number(names[0], result.scores[names[0]])
        view.line(f"{what:24s} {label(names[0])} {score_text}   {clock(seconds)}")
        own = {group: result.scores_of(rows) for group, rows in groups.items()}
        peak = peak_memory_bytes()
        row = Row(name, kind, result.scores, result.predictions, peak, seconds, own)
        measured.append(row)
        if kind != "base":
            _record(directory, row)

    def begun(_: Event) -> None:
        """The federation starts the record, or resumes one; the base's row waits for that."""
        if waiting and not any(line["event"] == "row" for line in read_lines(directory / METRICS)):
            _record(directory, waiting[0])
        waiting.clear()

    def federate() -> None:
        simulate(settings, view, listeners=[begun])
        runtime.load(fold(read_adapter(settings.run.output_dir)))

    if "base" in arms:
        measure("base", lambda: runtime.load(runtime.fresh))
    waiting = measured.copy()
    measure("federated", federate)
    for site in sites if "alone" in arms else []:
        measure("alone", partial(_train, runtime, site.encoded, site.name, view), site.name)
    if "central" in arms:
        pooled = [row for site in sites for row in site.encoded]
        measure("central", partial(_train, runtime, pooled, "central", view, batches=len(sites)))
    _record_answers(directory, measured)
    write_results(directory)
    return measured


def _record(directory: Path, row: Row) -> None:
    """Add a row to the run's record."""
    append_event(
        directory,
        "row",
        name=f"{row.name}, alone" if row.kind == "alone" else row.name,
        kind=row.kind,
        scores=row.scores,
        groups=row.groups,
        peak_memory_bytes=row.peak_memory_bytes,
        wall_seconds=round(row.seconds, 3),
    )


def _record_answers(directory: Path, rows: list[Row]) -> None:
    """Write the answers of the base, the site alone, and central beside the federation's."""
    path = directory / PREDICTIONS
    answers = read_lines(path)
    for index, answer in enumerate(answers):
        answer["others"] = {
            row.kind: row.predictions[index]
            for row in rows
            if row.kind in ("base", "central") or row.name == answer.get("site")
        }
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    write_text(path, "".join(lines))


def _train(
    runtime: SiteRuntime, encoded: Encoded, name: str, view: View, *, batches: int = 1
) -> None:
    """Train the fresh adapter as long as the federation does, `batches` times the rows per step."""
    train = runtime.settings.train
    num_steps = runtime.settings.federation.total_steps
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
