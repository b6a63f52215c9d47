"""What federating brings: the base, every site alone, the federation, and central training.

All of them start from the same adapter and answer the same test rows. A site alone takes as many
steps as it takes in the federation; central training takes as many on the pooled rows, each step on
as many rows as all sites together.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedfora._seeds import derive_seed
from fedfora.adapter.state import fold
from fedfora.data.loading import Example, load_examples
from fedfora.evaluation.evaluate import evaluate
from fedfora.federated.settings import FederationSettings
from fedfora.federated.simulation import num_test_rows, simulate, work_of
from fedfora.federated.site import Workplace, open_site, open_workplace, site_names
from fedfora.models.saving import read_adapter
from fedfora.reporting.memory import peak_memory_bytes, reset_peak_memory
from fedfora.reporting.view import EVALUATED_ROW, View, clock
from fedfora.training.local import Encoded
from fedfora.training.schedule import Stretch
from fedfora.training.trainer import StepReport


@dataclass(frozen=True)
class Row:
    """One way of training, and what it came to."""

    name: str
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
    """Run all four and return their rows.

    Raises:
        ValueError: If there are no test rows, or the settings do not work.
    """
    if settings.data.test_file is None:
        raise ValueError("--test_file is missing: a comparison needs held-out rows")
    started = time.monotonic()
    examples = load_examples(settings.data.test_file, settings.data)
    examples = examples[: settings.evaluation.max_eval_samples]
    workplace = open_workplace(settings.run_config())
    sites = [open_site(workplace, i) for i in range(len(site_names(settings)))]
    rounds: list[dict[str, Any]] = []

    def measure(name: str, prepare: Callable[[], object]) -> Row:
        return _measured(name, prepare, workplace, examples, view)

    def federate() -> None:
        rounds.extend(simulate(settings, view))
        workplace.load(fold(read_adapter(settings.run.output_dir)))

    base = measure("base", lambda: workplace.load(workplace.fresh))
    federated = measure("federated", federate)
    alone = {
        site.name: measure(
            f"{site.name} alone", partial(_train, workplace, site.encoded, site.name, view)
        )
        for site in sites
    }
    pooled = [row for site in sites for row in site.encoded]
    central = measure(
        "central", partial(_train, workplace, pooled, "central", view, batches=len(sites))
    )
    return Comparison(
        base=base,
        alone=alone,
        federated=federated,
        central=central,
        examples=examples,
        uplink_bytes_per_round_and_site=rounds[-1]["sites"][0]["uplink_bytes"],
        seconds=time.monotonic() - started,
    )


def _measured(
    name: str,
    prepare: Callable[[], object],
    workplace: Workplace,
    examples: list[Example],
    view: View,
) -> Row:
    """Let `prepare` leave the model as it is to be judged; judge it, and measure both."""
    reset_peak_memory()
    started = time.monotonic()
    prepare()
    evaluation = workplace.settings.evaluation
    result = evaluate(
        workplace.model,
        workplace.base.tokenizer,
        examples,
        workplace.prompts,
        batch_size=evaluation.per_device_eval_batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        on_batch=lambda rows: view.advance(rows * EVALUATED_ROW, f"{name}: evaluation"),
    )
    seconds = time.monotonic() - started
    view.line(f"{name:24s} F1 {result.scores['f1']:.3f}   {clock(seconds)}")
    return Row(name, result.scores, result.predictions, peak_memory_bytes(), seconds)


def _train(
    workplace: Workplace, encoded: Encoded, name: str, view: View, *, batches: int = 1
) -> None:
    """Train the fresh adapter as long as the federation does, `batches` times the rows per step."""
    train = workplace.settings.train
    num_steps = _num_steps(workplace.settings)
    started = time.monotonic()

    def show(report: StepReport) -> None:
        speed = report.tokens / (time.monotonic() - started)
        what = f"{name} step {report.step}/{num_steps}"
        view.advance(batches, what, loss=report.loss, speed=speed)

    workplace.train(
        workplace.fresh,
        encoded,
        replace(train, gradient_accumulation_steps=batches * train.gradient_accumulation_steps),
        stretch=Stretch(first_step=0, num_steps=num_steps, total_steps=num_steps),
        seed=derive_seed(train.seed, "train", name),
        on_step=show,
    )


def _num_steps(settings: FederationSettings) -> int:
    return settings.federation.num_rounds * settings.federation.local_steps
