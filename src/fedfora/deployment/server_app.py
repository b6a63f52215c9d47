"""The coordinator's ServerApp on real machines: waits for the sites, then runs the same rounds.

Flower starts it in a process of the SuperLink's. Which run it is, and what the coordinator's own
settings are, is in the state of the coordinator's kit; only the shared settings traveled.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedfora.deployment import run_state
from fedfora.deployment.client_app import measured
from fedfora.deployment.flower_processes import ReplyBound
from fedfora.deployment.journal import RECEIVED, RUN_NAME, append
from fedfora.deployment.kit import CoordinatorKit, read_kit
from fedfora.deployment.supervisor import exit_with_parent, log_into
from fedfora.federated.coordinator.handshake import Membership
from fedfora.federated.coordinator.rounds import run_rounds
from fedfora.federated.settings import from_run_config
from fedfora.federated.site.identity import read_site_keys
from fedfora.registry import printable
from fedfora.reporting.record import Event

POLL_S = 1.0

logger = logging.getLogger(__name__)


app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and record how they ended."""
    exit_with_parent()
    kit = read_kit(os.environ[run_state.KIT], CoordinatorKit)
    run = _run_of(kit, context)
    run_state.write_attempt(kit.state, run)
    log_into(kit.state / "logs" / "server.log")
    try:
        settings, members = from_run_config(run.run_config), _Members(kit.state)
        quorum = kit.quorum or settings.rounds.min_clients
        nodes, deadline_s = run_state.read_nodes(kit.state), settings.rounds.start_deadline
        _wait_for_sites(grid, nodes, quorum=quorum, deadline_s=deadline_s)
        members.bound.install()
        _in_the_journal(grid, kit.state, run.name, members.name_of)
        run_rounds(grid, run.run_config, [partial(_note, kit.state, run.name)], members)
    except Exception as error:
        logger.exception("run %s ended", run.name)
        status = run_state.STOPPED if isinstance(error, ValueError) else run_state.FAILED
        reason = str(error) or type(error).__name__
        run_state.write_attempt(kit.state, run, status, reason)
        raise
    run_state.write_attempt(kit.state, run, run_state.FINISHED)


def _run_of(kit: CoordinatorKit, context: Context) -> run_state.PlannedRun:
    """Return the daemon's run; or, if somebody typed `flwr run`, a run of its own."""
    planned, name = run_state.read_run(kit.state), context.run_config.get(RUN_NAME)
    if planned is not None and planned.name == name:
        return planned
    output_dir = kit.state / run_state.RUNS / f"flwr-{context.run_id}"
    settings = run_state.settings_for(kit, output_dir, context.run_config)
    return run_state.PlannedRun(str(context.run_id), 1, settings.run_config())


def _in_the_journal(grid: Grid, state: Path, run: str, name_of: Callable[[int], str]) -> None:
    """Let a Grid record each answer that it pulls in the journal, as its site did."""
    pull = grid.pull_messages

    def pull_messages(message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pull(message_ids))
        for reply in replies:
            facts: dict[str, Any] = {"site": name_of(reply.metadata.src_node_id), "run": run}
            error = printable(reply.error.reason) if reply.has_error() else None
            facts |= {"error": error} if reply.has_error() else measured(reply.content)
            append(state, RECEIVED, id=reply.metadata.reply_to_message_id, **facts)
        return replies

    grid.pull_messages = pull_messages


def _note(state: Path, run: str, event: Event) -> None:
    """Record in the journal who was left out of a run, joined later or left, and why."""
    if event["event"] in ("absent", "rejected", "joined", "resumed"):
        facts = {name: event[name] for name in ("site", "round", "reason") if name in event}
        append(state, event["event"], run=run, **facts)


def _wait_for_sites(
    grid: Grid, nodes: Mapping[str, int], *, quorum: int, deadline_s: float | None
) -> None:
    """Wait until all sites are there; raise if fewer than a quorum are at the deadline."""
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
            f"sites connected within {deadline_s:g} s: {len(present)} of {len(nodes)}, {quorum} "
            f"needed; missing: {', '.join(missing[:10])}"
        )


class _Members(Membership):
    """Which node is which site, as the daemon registered them; read again each time it is asked."""

    grows = True

    def __init__(self, state: Path) -> None:
        self.state = state
        self.bound = ReplyBound()

    def agreed(self, size: int) -> None:
        """Allow no reply much larger than an adapter."""
        self.bound.agreed(size)

    def name_of(self, node_id: int) -> str:
        """Return the site whose key a node has."""
        names = {node: site for site, node in run_state.read_nodes(self.state).items()}
        return names.get(node_id, f"node {node_id}")

    def objection(self, node_id: int, index: int, name: str) -> str | None:
        """Return why a node may not be the site that it says it is; None where it may."""
        names = {node: site for site, node in run_state.read_nodes(self.state).items()}
        registered = names.get(node_id)
        if registered is None:
            return "its node is not registered"
        if registered != name:
            return f"it claims to be {name!r}, but has the key of {registered!r}"
        known = read_kit(self.state.parent, CoordinatorKit).sites.get(name)
        return None if known == index else f"it claims number {index}, but {name} is {known}"

    def identity(self, index: int) -> bytes | None:
        """Return the public key of a site's kit."""
        kit = read_kit(self.state.parent, CoordinatorKit)
        return read_site_keys(kit.site_keys).get(index)
