"""fedfora demo: four clinics learn together, and a table shows what each gains.

Needs nothing but the package: the base model and the notes are included.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfora.cli.console import announce, silence_libraries
from fedfora.cli.simulate import SENT, print_comparison, table_of_arms
from fedfora.config import ConfigParser, flag
from fedfora.reporting.card import card_of
from fedfora.reporting.history import read_lines, read_run

# The options of `fedfora simulate`; docs/log.md says how the numbers were found.
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
    "eval_rounds": 10,
    "max_target_length": 64,
    "compare": "base alone central",
}


@dataclass
class DemoArguments:
    """Output directory and seed."""

    output_dir: str = flag("out/demo", "run directory: adapter, metrics, summary.json")
    overwrite_output_dir: bool = flag(False, "write over an earlier run in output_dir")
    seed: int = flag(42, "seed of all the demo's randomness")


def run(argv: Sequence[str]) -> None:
    """Parse, run the comparison, print its table and write summary.json."""
    (arguments,) = ConfigParser([DemoArguments], description=__doc__).parse(argv)
    silence_libraries()
    from fedfora.federated.preflight import preflight, work_of
    from fedfora.federated.settings import from_run_config

    settings = from_run_config(SETTINGS | vars(arguments))
    names = preflight(settings)
    announce(f"Four clinics: {', '.join(names)}. Their notes stay where they are; adapters travel")
    from fedfora.federated.comparison import compare
    from fedfora.reporting.record import write_json
    from fedfora.reporting.view import View

    started = time.monotonic()
    with View(work_of(settings)) as view:
        compare(settings, view)
    summary = summarize(arguments.output_dir) | {"seconds": time.monotonic() - started}
    write_json(Path(arguments.output_dir) / "summary.json", summary)
    show(arguments.output_dir, summary["seconds"])


def summarize(output_dir: str) -> dict[str, Any]:
    """Return the contents of summary.json, apart from the time."""
    card = card_of(read_run(output_dir))
    table, names = table_of_arms(card), ("precision", "recall", "f1", "parse_rate")
    return {
        "rows": [
            {"name": name, **{key: scores[key] for key in names}, "seconds": seconds}
            for name, scores, _, seconds in table
        ],
        SENT: card["federation"][SENT],
        "peak_memory_bytes": max(memory for _, _, memory, _ in table),
    }


def show(output_dir: str, seconds: float) -> None:
    """Print the tables, three notes with their triples, and what to type next."""
    from rich.console import Console

    from fedfora.evaluation.output import PREDICTIONS
    from fedfora.reporting.sections import compared
    from fedfora.reporting.view import clock

    print_comparison(output_dir, "Triples found in held-out notes of all four specialties")
    console = Console(soft_wrap=True, markup=False)
    console.print(
        "base: no adapter. alone: one clinic on its own notes. federated: all clinics, the notes\n"
        "stay, adapters are averaged. central: all notes in one place, as many steps.\n"
        "parse rate: share of answers that have the form of triples, right or wrong."
    )
    console.print("\nThree notes, as the federation reads them:")
    for row in map(compared, read_lines(Path(output_dir) / PREDICTIONS)[:3]):
        console.print(f"\n  {row['input']}", highlight=False)
        surplus = [line for line in row["predicted"] if line[0] == "wrong"]
        for mark, triple in [*row["expected"], *surplus]:
            console.print(f"    {mark:6s}  {triple}", highlight=False)
    console.print(f"\nRun directory: {output_dir}   whole demo: {clock(seconds)}")
    console.print(f"Report: {output_dir}/report.html")
    console.print("Next:")
    console.print(f"  fedfora predict --model_dir {output_dir} --test_file clinic:test")
    console.print("  fedfora simulate --help")
