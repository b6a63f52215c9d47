"""A federation's run directory to the lines that end it: which adapter lies where, what is next."""

import json
from pathlib import Path

from fedfora.federated.coordinator.checkpoint import BEST, find_checkpoints


def next_steps(output_dir: str | Path) -> list[str]:
    """Return which adapter is which, where the report is, and what to type to use it."""
    directory = Path(output_dir)
    last = max(find_checkpoints(directory), default=0)
    lines = [f"adapter of the last round: {directory}"]
    if best := _best_round(directory):
        if best == last:
            lines[0] = f"adapter of the last round, which is also the best: {directory}"
        else:
            lines.append(f"adapter of the best round, {best} of {last}: {directory / BEST}")
    serve = directory / BEST if best not in (0, last) else directory
    return [
        *lines,
        f"report: {directory / 'report.html'}",
        f"try it: fedfora chat --adapter {serve}",
        f"serve it: fedfora export --model_dir {serve} --output_dir {directory}-lora",
    ]


def resume_hint(output_dir: str | Path) -> str:
    """Return how a stopped run goes on; empty where no round of it is finished."""
    directory = Path(output_dir)
    rounds = find_checkpoints(directory) if directory.is_dir() else {}
    if not rounds:
        return ""
    return f"after round {max(rounds)}; fedfora simulate --resume {directory} goes on from there"


def _best_round(directory: Path) -> int:
    said = directory / BEST / "round.json"
    if not said.is_file():
        return 0
    return int(json.loads(said.read_text(encoding="utf-8"))["round"])
