"""What the coordinator's daemon and its ServerApp tell each other: files in the kit's state.

`run.json`, by the daemon: which run is on, with all its settings, and how often it was started.
`server.json`, by the ServerApp: that it has begun, as which process. `outcome.json`, by the
ServerApp: how the run ended. A process that is killed writes nothing, and is missed.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fedfora.config import Scalar
from fedfora.reporting.record import write_text

KIT = "FEDFORA_COORDINATOR_KIT"  # variable of the SuperLink's processes: the kit's directory
RUN_NAME = "fedfora-run"  # in the run config: by what name sites know the run again
RUN, SERVER, OUTCOME, NODES = "run.json", "server.json", "outcome.json", "nodes.json"
RUNS = "runs"  # directory of the runs
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True)
class PlannedRun:
    """A run that is on.

    Args:
        name: By which sites know it again, however often it is started.
        attempt: How often it was started.
        run_config: All its settings, with the coordinator's own.
    """

    name: str
    attempt: int
    run_config: dict[str, Scalar]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished; stopped for a reason; or failed, and may be started again."""

    name: str
    attempt: int
    status: str
    reason: str


def write_run(state: Path, run: PlannedRun) -> None:
    """Write which run is on."""
    write_text(state / RUN, json.dumps(asdict(run), indent=1))


def read_run(state: Path) -> PlannedRun | None:
    """Return the run that is on; None where there never was one."""
    path = state / RUN
    return PlannedRun(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_begun(state: Path, run: PlannedRun) -> None:
    """Say that this process runs the run."""
    write_text(state / SERVER, json.dumps({"attempt": run.attempt, "pid": os.getpid()}))


def has_begun(state: Path, run: PlannedRun) -> bool:
    """Return whether some process has taken the run up."""
    return _begun(state).get("attempt") == run.attempt


def is_running(state: Path, run: PlannedRun) -> bool:
    """Return whether the process that took the run up is alive."""
    begun = _begun(state)
    if begun.get("attempt") != run.attempt:
        return False
    try:
        stat = Path(f"/proc/{begun['pid']}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # dead, and not waited for by Flower


def write_outcome(state: Path, outcome: Outcome) -> None:
    """Write how the run ended."""
    write_text(state / OUTCOME, json.dumps(asdict(outcome), indent=1))


def read_outcome(state: Path, run: PlannedRun) -> Outcome | None:
    """Return how the run ended; None while it has not."""
    path = state / OUTCOME
    if not path.is_file():
        return None
    outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    return outcome if (outcome.name, outcome.attempt) == (run.name, run.attempt) else None


def write_nodes(state: Path, nodes: dict[str, int]) -> None:
    """Write which node is which site."""
    write_text(state / NODES, json.dumps(nodes))


def read_nodes(state: Path) -> dict[str, int]:
    """Return the nodes by site."""
    path = state / NODES
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _begun(state: Path) -> dict[str, int]:
    path = state / SERVER
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
