"""fedfora demo: four clinics learn together, and a table says what it brought.

Needs nothing but the package: the base model and the notes come with it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfora.cli.console import announce, silence_libraries
from fedfora.config import ConfigParser, flag

if TYPE_CHECKING:
    from fedfora.federated.comparison import Comparison, Row

# What `fedfora simulate` would be told; docs/log.md says how the numbers were found.
SETTINGS: dict[str, Any] = {
    "model_name_or_path": "clinic-base",
    "quantization": "nf4",
    "train_file": "clinic",
    "test_file": "clinic:test",
    "partition": "by-column:specialty",
    "aggregation": "fedavg",
    "num_rounds": 30,
    "local_steps": 5,
    "lora_rank": 8,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 120,
    "eval_rounds": 10,
    "max_target_length": 64,
}


@dataclass
class DemoArguments:
    """Where the results go."""

    output_dir: str = flag("out/demo", "run directory: adapter, metrics, summary.json")
    overwrite_output_dir: bool = flag(False, "write over an earlier run in output_dir")
    seed: int = flag(42, "all randomness of the demo derives from it")


def run(argv: Sequence[str]) -> None:
    """Parse, run the comparison, print its table and write summary.json."""
    parser = ConfigParser([DemoArguments], prog="fedfora demo", description=__doc__)
    (arguments,) = parser.parse(argv)
    silence_libraries()
    from fedfora.federated.preflight import preflight
    from fedfora.federated.settings import from_run_config

    settings = from_run_config(
        SETTINGS
        | {
            "output_dir": arguments.output_dir,
            "overwrite_output_dir": arguments.overwrite_output_dir,
            "seed": arguments.seed,
        }
    )
    names = preflight(settings)
    announce(f"Four clinics: {', '.join(names)}. Their notes stay where they are; adapters travel")
    from fedfora.federated.comparison import compare, work_of_comparison
    from fedfora.reporting.record import write_text
    from fedfora.reporting.view import View

    with View(work_of_comparison(settings)) as view:
        comparison = compare(settings, view)
    summary = summarize(comparison)
    write_text(Path(arguments.output_dir) / "summary.json", json.dumps(summary, indent=2) + "\n")
    show(comparison, arguments.output_dir)


def summarize(comparison: "Comparison") -> dict[str, Any]:
    """Return what summary.json holds."""
    names = ("precision", "recall", "f1", "parse_rate")
    return {
        "rows": [
            {"name": name, **{key: scores[key] for key in names}, "seconds": seconds}
            for name, scores, _, seconds in table_rows(comparison)
        ],
        "uplink_bytes_per_round_and_site": comparison.uplink_bytes_per_round_and_site,
        "peak_memory_bytes": max(memory for _, _, memory, _ in table_rows(comparison)),
        "seconds": comparison.seconds,
    }


def table_rows(comparison: "Comparison") -> list[tuple[str, dict[str, float], int, float]]:
    """Return name, scores, peak memory and seconds of each row of the table."""
    alone = list(comparison.alone.values())
    worst = min(alone, key=lambda row: row.scores["f1"])
    keys = ("precision", "recall", "f1", "parse_rate")
    mean = {key: sum(row.scores[key] for row in alone) / len(alone) for key in keys}
    return [
        _table_row("base", comparison.base),
        (
            "alone_mean",
            mean,
            max(row.peak_memory_bytes for row in alone),
            sum(row.seconds for row in alone) / len(alone),
        ),
        _table_row("alone_worst", worst),
        _table_row("federated", comparison.federated),
        _table_row("central", comparison.central),
    ]


def show(comparison: "Comparison", output_dir: str) -> None:
    """Print the table, three notes with their triples, and what to type next."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from fedfora.reporting.view import clock

    labels = {
        "base": "base",
        "alone_mean": "alone, mean",
        "alone_worst": "alone, worst",
        "federated": "federated",
        "central": "central",
    }
    title = "Triples found in held-out notes of all four specialties"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    sent, memory_title = "uplink per\nround and site", "peak\nmemory"
    for column in ("precision", "recall", "F1", "parse\nrate", sent, memory_title, "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, scores, memory, seconds in table_rows(comparison):
        uplink = comparison.uplink_bytes_per_round_and_site
        table.add_row(
            labels[name],
            *(f"{scores[key]:.3f}" for key in ("precision", "recall", "f1", "parse_rate")),
            f"{uplink / 1024:.0f} KiB" if name == "federated" else "-",
            f"{memory / 2**20:,.0f} MiB",
            clock(seconds),
            style="bold" if name == "federated" else "",
        )
    console = Console(soft_wrap=True)
    console.print()
    console.print(table)
    console.print(
        "base: no adapter. alone: one clinic on its own notes. federated: all clinics, the notes\n"
        "stay, adapters are averaged. central: all notes in one place, as many steps.\n"
        "parse rate: share of answers that have the form of triples, right or wrong."
    )
    _show_examples(console, comparison)
    console.print(f"\nRun directory: {output_dir}   whole demo: {clock(comparison.seconds)}")
    console.print(f"Report: {output_dir}/report.html")
    console.print("Next:")
    console.print(f"  fedfora predict --model_dir {output_dir} --test_file clinic:test")
    console.print("  fedfora simulate --help")


def _show_examples(console: Any, comparison: "Comparison") -> None:
    """Print the first test note of three specialties, as the federation reads it."""
    console.print("\nThree notes, as the federation reads them:")
    for index in (0, 1, 2):
        example = comparison.examples[index]
        predicted = comparison.federated.predictions[index].strip().split("\n")
        expected = (example.output or "").split("\n")
        console.print(f"\n  {example.input}", highlight=False)
        for triple in expected:
            mark = "found " if triple in predicted else "missed"
            console.print(f"    {mark}  {triple}", highlight=False)
        for triple in predicted:
            if triple not in expected:
                console.print(f"    wrong   {triple}", highlight=False)


def _table_row(name: str, row: "Row") -> tuple[str, dict[str, float], int, float]:
    return name, row.scores, row.peak_memory_bytes, row.seconds
