"""A site's daemon: the resident trainer and Flower's SuperNode, supervised.

It runs for months beside them, so it loads neither Flower nor any library of models. Of the two it
starts those whose key its account may read, so one account can have the rows, another the network.

As a program, this module is the trainer's process, and loads no more than that takes.
"""

import getpass
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from fedfora.deployment import journal
from fedfora.deployment.flower_processes import CLIENT_CERTIFICATE, CLIENT_KEY, PROGRAM, environment
from fedfora.deployment.kit import SiteKit, read_kit
from fedfora.deployment.supervisor import (
    HEARTBEAT,
    LONGEST_PAUSE_S,
    TRAINER,
    Child,
    HeartbeatMonitor,
    Supervisor,
    log_into,
    only_one,
    stoppable,
)

CHECK_S = 0.5
SUPERNODE, LOGS = "SuperNode", "logs"
PROCESS = "fedfora.deployment.site"  # this module, as the trainer's process is started

# Libraries import these in passing: transformers' Trainer datasets, and with it pandas, PyArrow and
# aiohttp, to recognize its data sets, though a site's rows are lists; a detection loss SciPy.
NOT_FOR_TRAINING = ("datasets", "scipy", "sklearn")


def run_site(
    kit: SiteKit, say: Callable[[str], None], serve: Callable[[], None] | None = None
) -> None:
    """Run a site until this process is told to stop.

    Args:
        kit: The site's.
        say: Receives one line about each event.
        serve: Does the trainer's work in this process, forever; None for a process of its own. It
            is not restarted if it hangs.

    Raises:
        ValueError: If this account may read no key, or a process already runs for the kit.
    """
    started = [each for each in children(kit) if serve is None or each.name == SUPERNODE]
    if not started:
        raise ValueError(f"--kit {kit.directory}: {getpass.getuser()} can read none of its keys")
    with stoppable(), ExitStack() as locks:
        for child in started:
            locks.enter_context(only_one(kit.state, f"{child.name}.daemon.lock"))
        if started[-1].name == SUPERNODE:  # the journal is its account's
            with suppress(OSError):  # on a full disk it says so to the coordinator, by its code
                journal.append(kit.state, "started", site=kit.name, account=getpass.getuser())
        if serve is not None:
            log_into(kit.state / LOGS / "trainer.log")
        supervisor, over = Supervisor(started, say), Event()
        with supervisor.running():
            if serve is None:
                _keep_running(supervisor, kit.state, over)
                return
            keeper = Thread(target=_keep_running, args=(supervisor, kit.state, over), daemon=True)
            keeper.start()
            try:
                serve()
            finally:
                over.set()
                keeper.join()


def _keep_running(supervisor: Supervisor, state: Path, over: Event) -> None:
    last, told = supervisor.children[-1], False
    while not over.wait(CHECK_S):
        supervisor.check()
        in_vain = last.pause_s >= LONGEST_PAUSE_S  # it has not lasted, again and again
        if in_vain and not told and last.name == SUPERNODE:
            supervisor.say("ALARM not_let_in: see `fedfora check site`, and the SuperNode's log")
            journal.alarm(state, "not_let_in", log=str(last.log))
        told = in_vain


def children(kit: SiteKit) -> list[Child]:
    """Return the processes of a site that this account has the key for."""
    logs = kit.state / LOGS
    watch = HeartbeatMonitor(kit.state / HEARTBEAT)
    flower = {**environment(kit.state / "flower"), journal.STATE: str(kit.state)}
    if kit.client_certificate.is_file():
        flower |= {CLIENT_CERTIFICATE: str(kit.client_certificate), CLIENT_KEY: str(kit.client_key)}
    trainer = Child(
        "trainer",
        lambda: [sys.executable, "-m", PROCESS, str(kit.directory)],
        logs / "trainer.log",
        {"TORCHINDUCTOR_CACHE_DIR": str(kit.state / "torchinductor")},
        after_start=watch.begin,
        trouble=watch.problem,
    )
    supernode = Child(SUPERNODE, lambda: supernode_command(kit), logs / "supernode.log", flower)
    keys = {kit.signing_key: trainer, kit.node_key: supernode}
    return [child for key, child in keys.items() if os.access(key, os.R_OK)]


def supernode_command(kit: SiteKit) -> list[str]:
    """Return the command of Flower's SuperNode: keys, gate, and where its trainer listens.

    What the node is told stays there: the coordinator does not see a node's configuration.
    """
    host = f"[{kit.host}]" if ":" in kit.host else kit.host
    config = {"partition-id": kit.index, TRAINER: str(kit.state)}
    words = [sys.executable, "-m", PROGRAM, "supernode"]
    words += ["--superlink", f"{host}:{kit.port}", "--root-certificates", str(kit.authority)]
    words += ["--auth-supernode-private-key", str(kit.node_key)]
    words += ["--node-config", " ".join(f"{key}={json.dumps(v)}" for key, v in config.items())]
    return words


def main(directory: str) -> None:
    """Serve the site whose kit is in a directory."""
    with hide_packages(*NOT_FOR_TRAINING):
        from fedfora.deployment.trainer import serve_site
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    kit = read_kit(directory, SiteKit)
    os.chdir(kit.directory)  # relative paths in kit.yaml start there
    serve_site(kit)


@contextmanager
def hide_packages(*packages: str) -> Iterator[None]:
    """Make packages look not installed while the block runs; later imports find them.

    Packages that are loaded already stay.
    """
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python then says "not found"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


if __name__ == "__main__":
    main(sys.argv[1])
