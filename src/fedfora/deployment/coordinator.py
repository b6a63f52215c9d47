"""The coordinator's daemon: SuperLink on loopback, the gate before it, the sites' keys, the run.

The SuperLink keeps its state in memory and loses it when it ends: what must last lies in the kit
and in the run's checkpoints. So a SuperLink that was started anew is told the sites' keys again,
and the run that was on is started again, from its newest checkpoint.
"""

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedfora.deployment import run_state
from fedfora.deployment.check_federation import RENEW, check_certificate
from fedfora.deployment.flower_processes import FlowerCommand, FlowerCommandError, environment
from fedfora.deployment.gate import gate_command
from fedfora.deployment.kit import CoordinatorKit
from fedfora.deployment.supervisor import Child, Supervisor, only_one, stoppable

CHECK_S = 0.5
LOOK_S = 3600.0  # the certificate's dates are looked at so often


class Coordinator:
    """The processes of a coordinator, and which sites its SuperLink knows.

    Args:
        kit: The coordinator's.
        say: Told in one line what happens.
    """

    def __init__(self, kit: CoordinatorKit, say: Callable[[str], None]) -> None:
        self.kit = kit
        self.say = say
        self.flower = FlowerCommand(kit.state / "flower", kit.superlink_port, kit.authority)
        self.nodes: dict[str, int] = {}
        self.starts = 0  # of the SuperLink
        self._keys: dict[str, bytes] = {}
        self._certificate = b""  # as the processes have read it
        self._look_at, self._said = 0.0, ""
        self._supervisor = Supervisor(self._children(), say)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the processes while the block runs; call `check` in it now and then.

        Raises:
            ValueError: If no site would talk to them: the gate's certificate does not hold.
        """
        try:
            check_certificate(self.kit)
        except ValueError as error:
            raise ValueError(f"{error}: {RENEW}") from error
        with only_one(self.kit.state, "coordinator.lock"):
            self._certificate = self.kit.server_certificate.read_bytes()
            self.flower.write_configuration()
            with self._supervisor.running():
                yield

    def check(self) -> None:
        """Restart what has ended; let in and throw out the sites that the kit says."""
        self._supervisor.check()
        self._watch_certificate()
        if self.is_ready:
            try:
                self._follow_kit()
            except FlowerCommandError as error:
                self._say_once(str(error))

    @property
    def is_ready(self) -> bool:
        """Whether the SuperLink answers."""
        return _listens(self.kit.superlink_port)

    @property
    def knows_all_sites(self) -> bool:
        """Whether the SuperLink has been told the keys of all sites of the kit."""
        return self.is_ready and set(self.nodes) == set(self._found_keys())

    @property
    def certificate_holds(self) -> bool:
        """Whether the gate's certificate holds, now and for this host."""
        try:
            check_certificate(self.kit)
        except ValueError:
            return False
        return True

    def _watch_certificate(self) -> None:
        """Say when the certificate ends; let the processes read one that was renewed."""
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
            self._say_once(f"the certificate holds {said}: {RENEW}")
        if renewed:
            self._certificate = self.kit.server_certificate.read_bytes()
            self.say(f"the certificate is new, {said}: the gate takes it, the SuperLink restarts")
            gate = self._supervisor.children[1].process
            if gate is not None:
                gate.send_signal(signal.SIGHUP)
            self.restart_superlink()

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self.say(text)

    def restart_superlink(self) -> None:
        """End the SuperLink, so that it is started anew."""
        self._supervisor.children[0].signal(signal.SIGKILL)

    def _follow_kit(self) -> None:
        keys = self._found_keys()
        gone = [name for name in self._keys if keys.get(name) != self._keys[name]]
        for name in gone:
            self.flower.unregister(self.nodes[name])
            self._forget(name)
            self.say(f"site {name} is no longer let in")
        for name in keys:
            if name not in self._keys:
                self.nodes[name] = self.flower.register(self.kit.node(name))
                self._keys[name] = keys[name]
                run_state.write_nodes(self.kit.state, self.nodes)
                self.say(f"site {name} is let in")

    def _found_keys(self) -> dict[str, bytes]:
        directory = self.kit.node("any").parent
        return {path.stem: path.read_bytes() for path in sorted(directory.glob("*.pub"))}

    def _forget(self, name: str) -> None:
        del self.nodes[name], self._keys[name]
        run_state.write_nodes(self.kit.state, self.nodes)

    def _superlink_started(self) -> None:
        """A new SuperLink knows nobody."""
        self.starts += 1
        self.nodes, self._keys = {}, {}
        run_state.write_nodes(self.kit.state, {})

    def _children(self) -> list[Child]:
        kit, logs = self.kit, self.kit.state / "logs"
        variables = {**environment(kit.state / "flower"), run_state.KIT: str(kit.directory)}
        superlink = Child(
            "SuperLink",
            lambda: superlink_command(kit),
            logs / "superlink.log",
            variables,
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


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False
