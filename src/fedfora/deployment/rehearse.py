"""A rehearsal: the whole deployment on this machine for a few rounds, and a verdict per site.

Everything is real (processes, TLS, keys, gate), except that all sites are here. The kits are thrown
away afterwards; those of the real federation are made anew.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedfora.deployment import run_state
from fedfora.deployment.flower_processes import free_port
from fedfora.deployment.provision import Provisioned, provision
from fedfora.deployment.run import Silence
from fedfora.deployment.sites_file import SitesFile
from fedfora.deployment.supervisor import Child, Supervisor
from fedfora.reporting.history import read_lines
from fedfora.reporting.record import METRICS

CHECK_S = 0.5


@dataclass(frozen=True)
class Verdict:
    """How a site did.

    Args:
        site: Its name.
        rounds: Rounds in which its update was taken in.
        num_rounds: Rounds that there were to be.
        trouble: What went wrong, the newest last; empty where nothing did.
    """

    site: str
    rounds: int
    num_rounds: int
    trouble: list[str]

    @property
    def passed(self) -> bool:
        """Whether it took part in every round."""
        return self.rounds == self.num_rounds

    def line(self) -> str:
        """Return it in one line."""
        word = "ok    " if self.passed else "FAILED"
        why = f": {self.trouble[-1]}" if self.trouble and not self.passed else ""
        return f"{word} {self.site}: {self.rounds} of {self.num_rounds} rounds{why}"


@dataclass(frozen=True)
class Rehearsal:
    """How a rehearsal went.

    Args:
        verdicts: One for each site.
        status: The exit status of the coordinator; None where it was stopped after the deadline.
        directory: Where the run lies.
    """

    verdicts: list[Verdict]
    status: int | None
    directory: Path

    @property
    def passed(self) -> bool:
        """Whether the run came to its end with every site in every round."""
        return self.status == 0 and all(verdict.passed for verdict in self.verdicts)


def rehearse(
    plan: SitesFile,
    place: Path,
    say: Callable[[str], None],
    *,
    num_rounds: int,
    deadline_s: float,
) -> Rehearsal:
    """Rehearse a federation.

    Args:
        plan: The federation; its address is replaced by one of this machine.
        place: An empty directory, for the kits.
        say: Told in one line what happens.
        num_rounds: Rounds at most.
        deadline_s: Seconds after which it is stopped.
    """
    provisioned = provision(here(plan, num_rounds), place)
    with processes(provisioned, say) as supervisor:
        coordinator = supervisor.children[0]
        silence = Silence(say, provisioned.place / "logs")
        give_up = time.monotonic() + deadline_s
        while coordinator.is_alive and time.monotonic() < give_up:
            time.sleep(CHECK_S)
            if any((provisioned.kit.state / run_state.RUNS).glob("*/metrics.jsonl")):
                silence.end()
            silence.check("no run has begun")
        status = None if coordinator.process is None else coordinator.process.poll()
    if status is None:
        say(f"stopped after {deadline_s:g} s")
    state = provisioned.kit.state
    run = run_state.read_run(state)
    rounds = int(provisioned.kit.settings["num_rounds"])
    directory = Path(str(run.run_config["output_dir"])) if run else state / run_state.RUNS
    verdicts = [verdict_of(provisioned, name, directory, rounds) for name in plan.sites]
    return Rehearsal(verdicts, status, directory)


def here(plan: SitesFile, num_rounds: int) -> SitesFile:
    """Return the plan with all sites on this machine, on ports that are free, for a few rounds."""
    planned = int(plan.settings.get("num_rounds", num_rounds))
    return replace(
        plan,
        host="127.0.0.1",
        port=free_port(),
        superlink_port=free_port(),
        settings={**plan.settings, "num_rounds": min(planned, num_rounds)},
        sites={name: _absolute(own, plan.path.parent) for name, own in plan.sites.items()},
    )


@contextmanager
def processes(provisioned: Provisioned, say: Callable[[str], None]) -> Iterator[Supervisor]:
    """Run the coordinator for one run, and all sites, by the commands that people type."""
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


def verdict_of(provisioned: Provisioned, name: str, directory: Path, num_rounds: int) -> Verdict:
    """Return how a site did, from the run's record and, where it is of use, the site's own log."""
    events = read_lines(directory / METRICS)
    rounds = [event for event in events if event["event"] == "round"]
    took_part = sum(name in [site["site"] for site in event["sites"]] for event in rounds)
    nodes = run_state.read_nodes(provisioned.kit.state)
    called = {name, f"node {nodes.get(name)}"}
    trouble = [
        str(event["reason"])
        for event in events
        if event["event"] in ("rejected", "absent") and event["site"] in called
    ]
    trouble = [text + _from_log(provisioned.place / "sites" / name, text) for text in trouble]
    if not trouble and not took_part:
        trouble = ["it never came"]
    return Verdict(name, took_part, num_rounds, trouble)


def _from_log(kit: Path, reason: str) -> str:
    """Return what the site's log says of a code: here, and only here, both are at hand."""
    path = kit / "state" / "logs" / "trainer.log"
    if not reason.startswith("site-error") or not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    at = next((i for i, line in enumerate(lines) if reason in line), None)
    if at is None:
        return ""
    text = next((line for line in lines[at + 1 :] if line and line[0] not in " T\t"), "")
    return f" ({text})"


def _absolute(own: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Make paths that exist beside the sites file absolute."""
    return {
        name: str((directory / value).absolute())
        if isinstance(value, str) and value and (directory / value).exists()
        else value
        for name, value in own.items()
    }
