"""What the coordinator's daemon and its ServerApp tell each other: files in the kit's state.

`run.json`, by the daemon: the current run, with all its settings, and how often it was started.
`attempt.json`, by the ServerApp: which attempt of which run has begun, as which process, and how it
ended. A process that is killed writes no end; its absence is noticed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from fedfora.config import Scalar
from fedfora.deployment.kit import CoordinatorKit
from fedfora.deployment.settings import settings_of
from fedfora.federated.settings import FederationSettings
from fedfora.federated.settings_scope import LOCAL_ONLY
from fedfora.reporting.record import write_text

KIT = "FEDFORA_COORDINATOR_KIT"  # variable of the SuperLink's processes: the kit's directory
RUN, ATTEMPT, NODES = "run.json", "attempt.json", "nodes.json"
RUNS = "runs"  # directory of the runs
ROUND_DEADLINE_S, START_DEADLINE_S, QUORUM_WAIT_S = 3600.0, 600.0, 86_400.0  # unless set
BEGUN, FINISHED, STOPPED, FAILED = "begun", "finished", "stopped", "failed"


@dataclass(frozen=True)
class PlannedRun:
    """The current run.

    Args:
        name: By which sites recognize it, however often it is started.
        attempt: How often it was started.
        run_config: All its settings, with the coordinator's own.
    """

    name: str
    attempt: int
    run_config: dict[str, Scalar]


@dataclass(frozen=True)
class Attempt:
    """What the process that took up a run has reported.

    Args:
        name: Of the run.
        attempt: How often it was started by then.
        pid: The process.
        status: It has begun; finished; stopped for a reason; or failed, and may be restarted.
        reason: Why it ended so.
    """

    name: str
    attempt: int
    pid: int
    status: str
    reason: str

    @property
    def is_running(self) -> bool:
        """Whether its process is alive, and not a zombie of Flower's."""
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def write_run(state: Path, run: PlannedRun) -> None:
    """Write which run is current."""
    write_text(state / RUN, json.dumps(asdict(run), indent=1))


def read_run(state: Path) -> PlannedRun | None:
    """Return the current run; None if there never was one.

    It is found under `state`, wherever its kit was when the run began.
    """
    if not (known := _read(state / RUN)):
        return None
    place = state / RUNS / Path(known["run_config"]["output_dir"]).name
    known["run_config"]["output_dir"] = str(place)
    return PlannedRun(**known)


def write_attempt(state: Path, run: PlannedRun, status: str = BEGUN, reason: str = "") -> None:
    """Record that this process runs the run, or how it ended."""
    attempt = Attempt(run.name, run.attempt, os.getpid(), status, reason)
    write_text(state / ATTEMPT, json.dumps(asdict(attempt), indent=1))


def read_attempt(state: Path, run: PlannedRun) -> Attempt | None:
    """Return how this attempt of this run stands; None if no process has taken it up."""
    known = _read(state / ATTEMPT)
    mine = (known.get("name"), known.get("attempt")) == (run.name, run.attempt)
    return Attempt(**known) if mine else None


def write_nodes(state: Path, nodes: dict[str, int]) -> None:
    """Write which node is which site."""
    write_text(state / NODES, json.dumps(nodes))


def read_nodes(state: Path) -> dict[str, int]:
    """Return the nodes by site."""
    return _read(state / NODES)


def _read(path: Path) -> dict[str, Any]:
    """Return what a file says; nothing if it does not exist."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def settings_for(
    kit: CoordinatorKit, output_dir: Path, shared: Mapping[str, Scalar] | None = None
) -> FederationSettings:
    """Return the settings of a run of a real federation, in which nothing waits forever.

    Args:
        kit: The coordinator's.
        output_dir: The run's directory.
        shared: The settings that travel to the sites, if somebody else started the run; of the
            kit's, only the coordinator's own apply then.
    """
    values: dict[str, Any] = kit.settings
    if shared is not None:
        values = {**{name: value for name, value in values.items() if name in LOCAL_ONLY}, **shared}
    settings = settings_of({**values, "output_dir": str(output_dir)})
    rounds = settings.rounds
    rounds = replace(
        rounds,
        round_deadline=rounds.round_deadline or ROUND_DEADLINE_S,
        start_deadline=rounds.start_deadline or START_DEADLINE_S,
        quorum_wait=QUORUM_WAIT_S if rounds.quorum_wait is None else rounds.quorum_wait,
        min_clients=max(rounds.min_clients, kit.quorum or 1),
    )
    return replace(settings, rounds=rounds)
