"""What a run directory gets at the end: the evaluation card, the adapter's README, the report.

All three are made from the record, so they can be made again at any time.
"""

import json
from pathlib import Path

from fedfora.reporting.card import FILE as CARD
from fedfora.reporting.card import card_of
from fedfora.reporting.history import read_run
from fedfora.reporting.memory import peak_memory_bytes
from fedfora.reporting.model_card import model_card
from fedfora.reporting.record import RunRecord, write_text
from fedfora.reporting.report import FILE as REPORT
from fedfora.reporting.report import report


def finish_run(record: RunRecord) -> None:
    """Record the end of a run with its peak memory, and write its results."""
    record.log("finished", peak_memory_bytes=peak_memory_bytes(), wall_seconds=record.seconds())
    write_results(record.directory)


def write_results(directory: Path) -> None:
    """Write card.json, report.html and, where there is an adapter, its README.md."""
    run = read_run(directory)
    card = card_of(run)
    write_text(directory / CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    adapter_config = directory / "adapter_config.json"
    if adapter_config.is_file():
        config = json.loads(adapter_config.read_text(encoding="utf-8"))
        write_text(directory / "README.md", model_card(config, card))
    write_text(directory / REPORT, report([run]))
