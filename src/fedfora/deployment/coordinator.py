"""The coordinator's daemon: SuperLink on loopback behind the gate, the sites' keys, the run.

The SuperLink keeps its state in memory and loses it when it ends: what must last is in the kit and
in the run's checkpoints. So a restarted SuperLink is told the sites' keys again, and the current
run is restarted from its newest checkpoint.
"""

import getpass
import hashlib
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedfora.deployment import journal, run_state
from fedfora.deployment.checks import RENEW, check_certificate, run_check
from fedfora.deployment.flower_processes import FlowerCommand, FlowerCommandError, environment
from fedfora.deployment.gate import GATE_LOG, GateWatch, gate_command
from fedfora.deployment.kit import CoordinatorKit
from fedfora.deployment.supervisor import Child, Supervisor, only_one, stoppable
from fedfora.privacy.settings import PRIVACY_DIR

CHECK_S = 0.5
LOOK_S = 3600.0  # how often the certificate's dates are checked
WATCH_S = 5.0  # and how often the gate's log is read


class Coordinator:
    """The processes of a coordinator, and which sites its SuperLink knows.

    `say` receives one line about each event.
    """

    def __init__(self, kit: CoordinatorKit, say: Callable[[str], None]) -> None:
        self.kit = kit
        self.say = say
        self.flower = FlowerCommand(kit.state / "flower", kit.superlink_port, kit.authority)
        self.nodes: dict[str, int] = {}
        self.starts = 0  # of the SuperLink
        self._keys: dict[str, bytes] = {}
        self._certificate = b""  # as the processes have read it
        self._gate_files = self._read_gate_files()  # the same
        self._look_at, self._said = 0.0, ""
        self._watch, self._watch_at = GateWatch(kit.state / GATE_LOG, _addresses(kit.state)), 0.0
        self._supervisor = Supervisor(self._children(), say)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the processes while the block runs; call `check` in it now and then.

        Raises:
            ValueError: If no site would talk to them: the gate's certificate is not valid.
        """
        try:
            check_certificate(self.kit)
        except ValueError as error:
            raise ValueError(f"{error}: {RENEW}") from error
        with only_one(self.kit.state, "coordinator.lock"):
            self._certificate = self.kit.server_certificate.read_bytes()
            self.flower.write_configuration()
            self.note("started", account=getpass.getuser(), command=shlex.join(sys.argv))
            try:
                with self._supervisor.running():
                    yield
            finally:
                with suppress(OSError):
                    self.note("stopped")

    def note(self, event: str, **facts: Any) -> None:
        """Write into the kit's journal."""
        journal.append(self.kit.state, event, **facts)

    def alarm(self, event: str, **facts: Any) -> None:
        """Call for a person: in the journal, on the terminal, and by the kit's own program."""
        self.say(f"ALARM {event}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
        journal.alarm(self.kit.state, event, **facts)

    def check(self) -> None:
        """Restart what has ended; admit and remove sites as the kit says."""
        self._supervisor.check()
        self._watch_certificate()
        self._follow_gate_files()
        self._watch_gate()
        if self.is_ready:
            try:
                self._follow_kit()
            except FlowerCommandError as error:
                self._say_once(str(error))

    @property
    def is_ready(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.kit.superlink_port), timeout=1.0):
                return True
        except OSError:
            return False

    @property
    def knows_all_sites(self) -> bool:
        """Whether the SuperLink has been told the keys of all sites of the kit."""
        return self.is_ready and set(self.nodes) == set(self._found_keys())

    @property
    def certificate_holds(self) -> bool:
        """Whether the gate's certificate is valid, now and for this host."""
        return run_check("certificate", lambda: check_certificate(self.kit)).ok

    def _watch_gate(self) -> None:
        """Record, or raise an alarm about, who comes to the gate and who stays away."""
        now = time.monotonic()
        if now < self._watch_at:
            return
        self._watch_at = now + WATCH_S
        for event, is_alarm, facts in self._watch.look(self.nodes, now):
            (self.alarm if is_alarm else self.note)(event, **facts)

    def _watch_certificate(self) -> None:
        """Say when the certificate expires; let the processes read one that was renewed."""
        renewed = self.kit.server_certificate.read_bytes() != self._certificate
        if not renewed and time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_S
        try:
            said = check_certificate(self.kit)
        except ValueError as error:
            self._say_once(f"no site gets in: {error}: {RENEW}")
            return
        if "renew" in said:
            self._say_once(f"the certificate is valid {said}: {RENEW}")
        if renewed:
            self._certificate = self.kit.server_certificate.read_bytes()
            self.say(f"new certificate, {said}: the gate reloads it, the SuperLink restarts")
            self._reload_gate()
            self.restart_superlink()

    def _read_gate_files(self) -> bytes:
        paths = (self.kit.gate, self.kit.client_certificates)
        return b"".join(path.read_bytes() for path in paths if path.is_file())

    def _follow_gate_files(self) -> None:
        """Let the gate read its list of admitted sites, if that has changed."""
        files = self._read_gate_files()
        if files != self._gate_files:
            self._gate_files = files
            self._reload_gate()

    def _reload_gate(self) -> None:
        gate = self._supervisor.children[1].process
        if gate is not None:
            gate.send_signal(signal.SIGHUP)

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self.say(text)

    def restart_superlink(self) -> None:
        """End the SuperLink, so that it is restarted."""
        self._supervisor.children[0].signal(signal.SIGKILL)

    def _follow_kit(self) -> None:
        keys = self._found_keys()
        gone = [name for name in self._keys if keys.get(name) != self._keys[name]]
        for name in gone:
            self.flower.unregister(self.nodes[name])
            why = "it was revoked" if name not in keys else "its key has changed"
            self.note("let_out", site=name, node=self.nodes[name], why=why)
            del self.nodes[name], self._keys[name]
            run_state.write_nodes(self.kit.state, self.nodes)
            self.say(f"site {name} is no longer let in")
        for name in keys:
            if name not in self._keys:
                self.nodes[name] = self.flower.register(self.kit.node(name))
                self._keys[name] = keys[name]
                run_state.write_nodes(self.kit.state, self.nodes)
                key = hashlib.sha256(keys[name]).hexdigest()
                self.note("let_in", site=name, node=self.nodes[name], key=key)
                self.say(f"site {name} is let in")

    def _found_keys(self) -> dict[str, bytes]:
        directory = self.kit.node("any").parent
        return {path.stem: path.read_bytes() for path in sorted(directory.glob("*.pub"))}

    def _superlink_started(self) -> None:
        """A new SuperLink knows nobody."""
        self.starts += 1
        self.nodes, self._keys = {}, {}
        run_state.write_nodes(self.kit.state, {})

    def _children(self) -> list[Child]:
        kit, logs = self.kit, self.kit.state / "logs"
        ledgers = os.environ.get(PRIVACY_DIR, str(kit.state / "privacy"))
        variables = {run_state.KIT: str(kit.directory), PRIVACY_DIR: ledgers}
        superlink = Child(
            "SuperLink",
            lambda: superlink_command(kit),
            logs / "superlink.log",
            environment(kit.state / "flower") | variables,
            self._superlink_started,
        )
        return [superlink, Child("gate", lambda: gate_command(kit), logs / "gate.log")]


def run_coordinator(kit: CoordinatorKit, say: Callable[[str], None]) -> None:
    """Keep the coordinator's processes running until this process is told to stop."""
    coordinator = Coordinator(kit, say)
    with stoppable(), coordinator.running():
        while True:
            time.sleep(CHECK_S)
            coordinator.check()


def superlink_command(kit: CoordinatorKit) -> list[str]:
    """Return how Flower's SuperLink is started: on loopback, with TLS, for registered nodes."""
    words = [str(Path(sys.executable).parent / "flower-superlink"), "--host", "127.0.0.1"]
    words += ["--port", str(kit.superlink_port), "--enable-supernode-auth"]
    words += ["--ssl-ca-certfile", str(kit.authority)]
    words += ["--ssl-certfile", str(kit.server_certificate), "--ssl-keyfile", str(kit.server_key)]
    return [*words, "--disable-runtime-dependency-installation"]


def _addresses(state: Path) -> dict[str, str]:
    """Return each site's last address, from the journal; nothing if that is damaged."""
    with suppress(ValueError):
        lines = journal.read_journal(state)
        return {line["site"]: line["address"] for line in lines if line["event"] == "address"}
    return {}
