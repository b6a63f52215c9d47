"""The coordinator's ServerApp on real machines: waits for the sites, then runs the same rounds.

Flower starts it in a process of the SuperLink's. Which run it is, and what the coordinator's own
settings are, stands in the state of the coordinator's kit; only the shared settings traveled.
"""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfora.deployment.flower_processes import ReplyBound
from fedfora.deployment.kit import CoordinatorKit, read_coordinator_kit
from fedfora.deployment.run_state import (
    FAILED,
    FINISHED,
    KIT,
    RUN_NAME,
    RUNS,
    STOPPED,
    Outcome,
    PlannedRun,
    read_nodes,
    read_run,
    settings_for,
    write_begun,
    write_outcome,
)
from fedfora.deployment.supervisor import exit_with_parent
from fedfora.federated.coordinator.handshake import Membership
from fedfora.federated.coordinator.rounds import run_rounds
from fedfora.federated.settings import from_run_config

POLL_S = 1.0

logger = logging.getLogger(__name__)


def make_app() -> ServerApp:
    """Return the app."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        """Run the rounds, and leave word of how they ended."""
        exit_with_parent()
        kit = read_coordinator_kit(os.environ[KIT])
        run = _run_of(kit, context)
        write_begun(kit.state, run)
        _log_to(kit)
        try:
            _run(kit, run, grid)
        except Exception as error:
            logger.exception("run %s ended", run.name)
            status = STOPPED if isinstance(error, ValueError) else FAILED
            reason = str(error) or type(error).__name__
            write_outcome(kit.state, Outcome(run.name, run.attempt, status, reason))
            raise
        write_outcome(kit.state, Outcome(run.name, run.attempt, FINISHED, ""))

    return app


def _log_to(kit: CoordinatorKit) -> None:
    """Keep what is logged: Flower throws away what a run's process prints."""
    logs = kit.state / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(logs / "server.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("fedfora")
    package.addHandler(handler)
    package.setLevel(logging.INFO)


def _run_of(kit: CoordinatorKit, context: Context) -> PlannedRun:
    """Return the daemon's run; or, where somebody typed `flwr run`, one of its own."""
    planned, name = read_run(kit.state), context.run_config.get(RUN_NAME)
    if planned is not None and planned.name == name:
        return planned
    output_dir = kit.state / RUNS / f"flwr-{context.run_id}"
    settings = settings_for(kit, output_dir, context.run_config)
    return PlannedRun(str(context.run_id), 1, settings.run_config())


def _run(kit: CoordinatorKit, run: PlannedRun, grid: Grid) -> None:
    settings = from_run_config(run.run_config)
    nodes = read_nodes(kit.state)
    quorum = kit.quorum or settings.rounds.min_clients
    wait_for_sites(grid, nodes, quorum=quorum, deadline_s=settings.rounds.start_deadline)
    members = _Members(kit.state)
    members.bound.install()
    run_rounds(grid, run.run_config, members=members)


def wait_for_sites(
    grid: Grid, nodes: Mapping[str, int], *, quorum: int, deadline_s: float | None
) -> None:
    """Wait until all sites are there, or a quorum once the deadline is over.

    Raises:
        ValueError: If fewer than a quorum are there then.
    """
    started = time.monotonic()
    while True:
        present = set(grid.get_node_ids())
        missing = sorted(name for name, node in nodes.items() if node not in present)
        if not missing:
            return
        if deadline_s is not None and time.monotonic() - started > deadline_s:
            break
        time.sleep(POLL_S)
    if len(present) < quorum:
        raise ValueError(
            f"only {len(present)} of {len(nodes)} sites came within {deadline_s:g} s, {quorum} "
            f"needed; missing: {', '.join(missing[:10])}"
        )


class _Members(Membership):
    """Which node is which site, as the daemon registered them; read anew each time it is asked."""

    grows = True

    def __init__(self, state: Path) -> None:
        self.state = state
        self.bound = ReplyBound()

    def agreed(self, size: int) -> None:
        """Let no reply be much larger than an adapter."""
        self.bound.agreed(size)

    def name_of(self, node_id: int) -> str:
        """Return the site whose key a node has."""
        names = {node: site for site, node in read_nodes(self.state).items()}
        return names.get(node_id, f"node {node_id}")

    def objection(self, node_id: int, index: int, name: str) -> str | None:
        """Return why a node may not be the site that it says it is; None where it may."""
        names = {node: site for site, node in read_nodes(self.state).items()}
        registered = names.get(node_id)
        if registered is None:
            return "its node is not registered"
        if registered != name:
            return f"it says it is {name!r}, its key is that of {registered!r}"
        known = read_coordinator_kit(self.state.parent).sites.get(name)
        return None if known == index else f"it says it is number {index}, {name} is {known}"


app = make_app()
