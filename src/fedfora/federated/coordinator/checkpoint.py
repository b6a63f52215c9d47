"""Checkpoints: all that a federation needs to continue after any round, complete or absent.

A checkpoint is a directory `round-NNN` in the run directory. It is written under another name,
synced to the disk, and renamed, so a run that is killed at any point leaves either this round or
the one before. It holds the global adapter as PEFT writes it, ready to use, and

- `state.safetensors`: `adapter.<layer>.<factor>`, the folded adapter to the bit, and
  `server.<name>`, whatever tensors the server's optimizer keeps from round to round;
- `state.json`: the round, the selection so far, and how long metrics.jsonl was.

No random state is kept because none is needed: every draw derives from the run's seed and
the round (and site) it is for. What a site keeps from round to round is the site's own
(`fedfora.federated.site.memory`).

`best` is a copy of the best round's adapter, complete or absent. A kill between the renames that
put it in its place loses nothing: its checkpoint is kept, and resuming copies it again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedfora.federated.preflight import SITES_DIR
from fedfora.files import sync
from fedfora.protection.provenance import sign_directory, signed_files, signed_here
from fedfora.protection.sealing import load_tensors, read_bytes, save_tensors
from fedfora.reporting.record import is_ours

if TYPE_CHECKING:
    from fedfora.federated.aggregation.update import AdapterState

BEST = "best"
_NAME = re.compile(r"round-(\d{3,})")
_STATE, _TENSORS = "state.json", "state.safetensors"


# Which round is the best so far, and whether to continue.
# A round is judged by the loss on the rows that the sites keep back, where they keep any; otherwise
# by the score on the common test rows, where there are any (then that score is optimistic, as it
# chose the round). Lower losses and higher scores are better; of equal rounds the later one, which
# has trained longer. A score of 0 makes no round the best.


@dataclass(frozen=True)
class Selection:
    """The best round so far.

    Args:
        best_round: Its number, counted from 1; 0 if none was judged.
        best_value: Its loss or score.
        waited: Rounds judged since the value was first reached, none of them better.
    """

    best_round: int = 0
    best_value: float = 0.0
    waited: int = 0

    def judged(self, round_number: int, value: float, *, lower_is_better: bool) -> Selection:
        """Return the selection after another round was judged.

        An equal round replaces the best one, but counts against patience: it brought no progress.
        """
        better = value < self.best_value if lower_is_better else value > self.best_value
        if self.best_round == 0:
            nothing_right = value == 0 and not lower_is_better
            return self if nothing_right else Selection(round_number, value)
        if better:
            return Selection(round_number, value)
        best_round = round_number if value == self.best_value else self.best_round
        return replace(self, best_round=best_round, waited=self.waited + 1)

    def is_over(self, patience: int | None) -> bool:
        """Return whether as many rounds in a row as `patience` brought no progress."""
        return patience is not None and self.waited >= patience


@dataclass(frozen=True)
class FederationState:
    """The state of a federation.

    Args:
        round_number: The last finished round; 0 before the first.
        adapter: The global adapter, folded.
        server: Tensors of the server's optimizer by name; empty if it keeps none.
        selection: The best round so far.
        metrics_bytes: Length of metrics.jsonl after that round.
    """

    round_number: int
    adapter: AdapterState
    server: AdapterState = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    metrics_bytes: int = 0


def save_checkpoint(
    run_directory: Path, progress: FederationState, save_adapter_to: Callable[[Path], None]
) -> Path:
    """Write the checkpoint of a round, with the adapter as PEFT reads it; return its directory."""
    directory = run_directory / f"round-{progress.round_number:03d}"
    temporary = directory.with_name(f".{directory.name}.tmp")
    remove(temporary)
    temporary.mkdir()
    tensors = {f"adapter.{name}": value for name, value in progress.adapter.items()}
    tensors |= {f"server.{name}": value for name, value in progress.server.items()}
    save_tensors(temporary / _TENSORS, tensors)
    state = {
        "round_number": progress.round_number,
        "selection": asdict(progress.selection),
        "metrics_bytes": progress.metrics_bytes,
    }
    (temporary / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    save_adapter_to(temporary)  # and sign the whole
    _to_disk(temporary)
    remove(directory)
    temporary.rename(directory)
    sync(run_directory)
    return directory


def load_checkpoint(run_directory: Path) -> FederationState | None:
    """Return the newest checkpoint, or None before the first.

    Raises:
        ValueError: If its provenance does not verify, or it is encrypted and the key is not here.
    """
    checkpoints = find_checkpoints(run_directory)
    if not checkpoints:
        return None
    directory = checkpoints[max(checkpoints)]
    files = signed_files(directory)
    state = json.loads(read_bytes(directory / _STATE, files))
    parts: dict[str, AdapterState] = {"adapter": {}, "server": {}}
    for name, value in load_tensors(directory / _TENSORS, files).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    return FederationState(**{**state, **parts, "selection": Selection(**state["selection"])})


def find_checkpoints(run_directory: Path) -> dict[int, Path]:
    """Return the directories of all complete checkpoints by round."""
    return {
        int(match[1]): path
        for path in run_directory.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / _STATE).is_file()
    }


def publish_best(run_directory: Path, best_round: int) -> None:
    """Make `best` a copy of the best round's adapter, unless it already is."""
    target = run_directory / BEST
    if _best_round(run_directory) == best_round:
        return
    temporary, old = run_directory / f".{BEST}.tmp", run_directory / f".{BEST}.old"
    remove(temporary)
    remove(old)
    shutil.copytree(find_checkpoints(run_directory)[best_round], temporary)
    found = signed_here(temporary)
    for path in temporary.glob("state.*"):  # what a resumed run needs
        path.unlink()
    sign_directory(temporary, None)
    if found is not None:  # with the digests just checked, whatever lies on the disk by now
        files = {name: d for name, d in found.files.items() if not name.startswith("state.")}
        sign_directory(temporary, found.facts, files)
    (temporary / "round.json").write_text(
        json.dumps({"round": best_round}) + "\n", encoding="utf-8"
    )
    _to_disk(temporary)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    remove(old)


def prune(run_directory: Path, *, keep: int, best_round: int) -> None:
    """Remove all checkpoints but the newest ones and the best round's."""
    checkpoints = find_checkpoints(run_directory)
    for number in sorted(checkpoints)[:-keep]:
        if number != best_round:
            remove(checkpoints[number])


def forget_halves(run_directory: Path) -> None:
    """Remove what a killed run left half done."""
    for pattern in (".round-*", f".{BEST}.*"):
        for path in run_directory.glob(pattern):
            remove(path)


def remove(directory: Path) -> None:
    """Remove a directory, if it exists; what a kill leaves, `forget_halves` finds."""
    if directory.exists():
        going = directory
        if not directory.name.startswith("."):
            going = directory.with_name(f".{directory.name}.old")
            remove(going)
            directory.rename(going)
        shutil.rmtree(going)


def _to_disk(directory: Path) -> None:
    for path in directory.iterdir():
        sync(path)
    sync(directory)


def forget_earlier_run(directory: Path) -> None:
    """Remove what an overwritten run left; its configuration goes first, so it cannot come back."""
    for path in [*find_checkpoints(directory).values(), directory / BEST]:
        remove(path)
    for path in (directory / SITES_DIR).glob("*"):
        if is_ours(path):
            shutil.rmtree(path)


# From a federation's run directory to its closing lines: which adapter is where, what to do next.


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
    """Return how to resume a stopped run; empty if none of its rounds is finished."""
    directory = Path(output_dir)
    rounds = find_checkpoints(directory) if directory.is_dir() else {}
    if not rounds:
        return ""
    return f"after round {max(rounds)}; fedfora simulate --resume {directory} resumes it"


def _best_round(directory: Path) -> int:
    record = directory / BEST / "round.json"
    if not record.is_file():
        return 0
    return int(json.loads(record.read_text(encoding="utf-8"))["round"])
