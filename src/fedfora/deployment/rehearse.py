"""A rehearsal: the whole deployment on this machine for a few rounds, and a verdict per site.

Everything is real (processes, TLS, keys, gate), except that all sites are here. The kits are thrown
away afterwards; the real federation gets new ones.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from fedfora.deployment import run_state
from fedfora.deployment.checks import CheckResult
from fedfora.deployment.flower_processes import free_port
from fedfora.deployment.provision import Provisioned, provision
from fedfora.deployment.settings import ProvisionArguments
from fedfora.deployment.sites_file import SitesFile
from fedfora.deployment.supervisor import Child, Supervisor
from fedfora.registry import counted
from fedfora.reporting.history import read_lines
from fedfora.reporting.record import METRICS, Event


def rehearse(
    plan: SitesFile, place: Path, say: Callable[[str], None], *, num_rounds: int, deadline_s: float
) -> Iterator[CheckResult]:
    """Rehearse a federation; yield how the coordinator and each of the sites did.

    Args:
        plan: The federation; its address is replaced by one of this machine.
        place: An empty directory, for the kits.
        say: Receives one line about each event.
        num_rounds: Maximum number of rounds.
        deadline_s: Seconds after which it is stopped.
    """
    provisioned = provision(here(plan, num_rounds), ProvisionArguments(output_dir=str(place)))
    with processes(provisioned, say) as supervisor:
        coordinator = supervisor.children[0]
        assert coordinator.process is not None
        try:
            status = coordinator.process.wait(timeout=deadline_s)
            message = f"exit status {status}"
        except TimeoutExpired:
            status, message = 1, f"not finished within {deadline_s:g} s (--deadline)"
    yield CheckResult("coordinator", status == 0, message, f"see {coordinator.log}")
    run = run_state.read_run(provisioned.kit.state)
    events = read_lines(Path(str(run.run_config["output_dir"])) / METRICS) if run else []
    for name in plan.sites:
        yield _verdict(provisioned, name, events)


def here(plan: SitesFile, num_rounds: int) -> SitesFile:
    """Return the plan with all sites on this machine, on free ports, for a few rounds."""
    planned = int(plan.settings.get("num_rounds", num_rounds))
    return replace(
        plan,
        host="127.0.0.1",
        port=free_port(),
        superlink_port=free_port(),
        settings={**plan.settings, "num_rounds": min(planned, num_rounds)},
        sites={name: _absolute(own, plan.path.parent) for name, own in plan.sites.items()},
    )


def _absolute(own: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Make paths that exist beside the sites file absolute."""
    texts = {name: value for name, value in own.items() if value and isinstance(value, str)}
    there = {name: directory / text for name, text in texts.items() if (directory / text).exists()}
    return own | {name: str(path.absolute()) for name, path in there.items()}


@contextmanager
def processes(provisioned: Provisioned, say: Callable[[str], None]) -> Iterator[Supervisor]:
    """Run the coordinator for one run, and all sites, with the commands that people type."""
    kits = {"coordinator": provisioned.kit.directory}
    kits |= {name: provisioned.place / "sites" / name for name in provisioned.kit.sites}
    words = {name: ["site"] for name in kits} | {"coordinator": ["coordinator", "run"]}
    fedfora = [sys.executable, "-m", "fedfora"]
    children = [
        Child(
            name,
            partial(list, [*fedfora, *words[name], "--kit", str(kits[name])]),
            provisioned.place / "logs" / f"{name}.log",
        )
        for name in kits
    ]
    supervisor = Supervisor(children, say)
    with supervisor.running():
        yield supervisor


def _verdict(provisioned: Provisioned, name: str, events: list[Event]) -> CheckResult:
    """Return how a site did, from the run's record and, where that helps, the site's own log."""
    planned = int(provisioned.kit.settings["num_rounds"])
    rounds = [event for event in events if event["event"] == "round"]
    came = sum(name in [site["site"] for site in event["sites"]] for event in rounds)
    called = (name, f"node {run_state.read_nodes(provisioned.kit.state).get(name)}")
    reasons = [
        str(event["reason"])
        for event in events
        if event["event"] in ("rejected", "absent") and event["site"] in called
    ]
    reason = reasons[-1] if reasons else "it never connected"
    remedy = reason + _from_log(provisioned.place / "sites" / name, reason)
    return CheckResult(name, came == planned, f"{came} of {counted(planned, 'round')}", remedy)


def _from_log(kit: Path, reason: str) -> str:
    """Return what the site's log says about a code: here, and only here, both are at hand."""
    path = kit / "state" / "logs" / "trainer.log"
    if not reason.startswith("site-error") or not path.is_file():
        return ""
    log = path.read_text(encoding="utf-8", errors="replace").partition(reason)[2]
    lines = log.splitlines()[1:]  # after it a traceback, and then the error
    return next((f" ({line})" for line in lines if line and line[0] not in " T\t"), "")
