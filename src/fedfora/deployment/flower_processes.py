"""Flower's processes as fedfora starts them: commands, environment, and what is taken from Flower.

`supernode`: Flower's SuperNode fetches messages and offers them on loopback; its SuperExec starts
one of six programs for them, which unpack and import the code that came with a run. Here

- the SuperNode takes messages of a ServerApp's run alone (`refuse_other_runs`): of another run it
  does not even fetch the code;
- no SuperExec runs. A thread of the SuperNode's (`start_clients`) asks for ClientApps' tasks and
  starts `clientapp` below. It gets the task's token on its standard input, and the right to ask for
  tasks is a secret that never leaves the SuperNode's memory, so no other account gets a task;
- the process ends when its main loop does, so that the supervisor can start it again.

`clientapp`: Flower's client process with the app that is installed here; what came with the run is
neither unpacked nor imported.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedfora.deployment import journal

KNOWN_TO_WORK = "1.42.0"  # of Flower: the tests on real processes ran with it
SERVED_RUNS, STARTED_TASKS = "flwr-serverapp", "flwr-clientapp"  # Flower's types of task
POLL_S = 0.2
SMALL_REPLY = 8 << 20  # bytes that every reply may have, whatever the adapter's size
PROGRAM = "fedfora.deployment.flower_processes"  # this module, as it is started
# Variables of a SuperNode: files with what it shows to the gate.
CLIENT_CERTIFICATE, CLIENT_KEY = "FEDFORA_CLIENT_CERTIFICATE", "FEDFORA_CLIENT_KEY"
LOOPBACK = "127.0.0.1,localhost,::1"
CONNECTION = "fedfora"  # what Flower's command calls the SuperLink

logger = logging.getLogger(__name__)


def environment(home: Path) -> dict[str, str]:
    """Return Flower's variables: no telemetry, update check or installs, its files in `home`."""
    scripts = str(Path(sys.executable).parent)
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(POLL_S),
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
        **around_loopback(),
    }


def around_loopback() -> dict[str, str]:
    """Return the variables that keep connections to this machine itself away from any proxy."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    spared = f"{given},{LOOPBACK}" if given else LOOPBACK
    return {"no_proxy": spared, "NO_PROXY": spared}


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def supernode() -> None:
    """Run Flower's SuperNode as the module describes; its process ends when its main loop does."""
    loop: Any = importlib.import_module("flwr.supernode.start_client_internal")
    program: Any = importlib.import_module("flwr.supernode.cli.flower_supernode")
    _check_parts(loop, "_pull_and_store_message", "RunNotRunningException")
    _check_parts(program, "start_client_internal", "flower_supernode")
    pull, run = loop._pull_and_store_message, program.start_client_internal

    def begin(**settings: Any) -> None:
        where, secret = settings["runtime_api_address"], settings["superexec_auth_secret"]
        threading.Thread(target=start_clients, args=(where, secret), daemon=True).start()
        run(**settings)

    if CLIENT_CERTIFICATE in os.environ:
        _show_certificate(os.environ[CLIENT_CERTIFICATE], os.environ[CLIENT_KEY])
    loop._pull_and_store_message = refuse_other_runs(pull, loop.RunNotRunningException)
    program.start_client_internal = begin
    sys.argv += ["--host", "127.0.0.1", "--port", str(free_port()), "--isolation", "process"]
    sys.argv += ["--superexec-auth-secret-file", _readable(secrets.token_bytes(32))]
    status = 1
    try:
        program.flower_supernode()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        raise
    finally:
        sys.stdout.flush()
        os._exit(status)


def _show_certificate(certificate: str, key: str) -> None:
    """Let Flower's client of the gate show a certificate when it connects."""
    connection: Any = importlib.import_module("flwr.supernode.fleet_http_connection")
    _check_parts(connection, "FleetHttpClient")

    class Client(connection.FleetHttpClient):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, verify: Any, **others: Any) -> None:
            verify.load_cert_chain(certificate, key)
            super().__init__(*args, verify=verify, **others)

    connection.FleetHttpClient = Client


def refuse_other_runs(pull: Callable[..., Any], refusal: type[BaseException]) -> Callable[..., Any]:
    """Return Flower's function that pulls a message, restricted to messages of ServerApps' runs.

    Args:
        pull: Flower's; it asks `get_run` for a message's run before it fetches the run's code.
        refusal: What `get_run` raises to make Flower drop the message.
    """

    def guarded(*, get_run: Callable[[int], Any], **others: Any) -> Any:
        def served(run_id: int) -> Any:
            run = get_run(run_id)
            if run.primary_task_type == SERVED_RUNS:
                return run
            kind = str(run.primary_task_type)[:40]
            told = "refused run %s: its type of task is %r, only %r is served here"
            logger.error(told, run_id, kind, SERVED_RUNS)
            if state := os.environ.get(journal.STATE):
                journal.alarm(Path(state), "refused_run", run=run_id, kind=kind)
            raise refusal

        return pull(get_run=served, **others)

    return guarded


def start_clients(address: str, secret: bytes) -> None:
    """Start a client process for each task of a ClientApp, forever; or end this process.

    Args:
        address: Of the SuperNode's own API, on loopback.
        secret: By which it knows who may ask for tasks.
    """
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.interceptors import (
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient

    running: list[subprocess.Popen[bytes]] = []
    wanted = AcquireTaskRequest(supported_task_types=[STARTED_TASKS])
    try:
        asking = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        api = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,  # loopback, as in Flower
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), asking],
            retry_invoker=make_simple_http_retry_invoker(),
        )
        while True:
            if token := api.AcquireTask(wanted).token:
                running.append(_start_client(address, token))
            running = [client for client in running if client.poll() is None]
            time.sleep(POLL_S)
    except Exception:
        logger.exception("no more tasks can be started")
        os._exit(1)


def _start_client(address: str, token: str) -> subprocess.Popen[bytes]:
    """Start a client; the token goes through its standard input, so no process list shows it."""
    words = [sys.executable, "-m", PROGRAM, "clientapp", address]
    client = subprocess.Popen(words, stdin=subprocess.PIPE)
    assert client.stdin is not None
    with contextlib.suppress(OSError), client.stdin:  # gone already: Flower gives the task up
        client.stdin.write(token.encode())
    return client


def clientapp() -> None:
    """Run Flower's client process with the app that is installed here.

    Raises:
        RuntimeError: If this version of Flower does not allow that; then nothing runs at all.
    """
    from flwr.supernode.runtime import run_clientapp

    from fedfora.deployment.client_app import app
    from fedfora.deployment.supervisor import exit_with_parent

    exit_with_parent()
    replacements = {
        "install_from_fab": lambda *args, **kwargs: None,
        "get_project_dir": lambda *args, **kwargs: Path.cwd(),
        "get_load_client_app_fn": lambda **kwargs: lambda *args: app,
    }
    _check_parts(run_clientapp, *replacements)
    for name, replacement in replacements.items():
        setattr(run_clientapp, name, replacement)
    run_clientapp.run_clientapp(
        runtime_api_address=sys.argv[1],
        token=sys.stdin.read(),
        insecure=True,
        runtime_dependency_install=False,
    )


class ReplyBound:
    """Lets Flower's Grid give up a site's reply that is too large or cannot be read.

    Either becomes that site's error, instead of filling this process's memory or ending the run.
    """

    def __init__(self) -> None:
        """Begin with the bound of every reply; the adapter's size is not known yet."""
        self.most_bytes = SMALL_REPLY

    def agreed(self, size: int) -> None:
        """Allow replies twice the bytes of an adapter of `size` float32 numbers, and some more."""
        self.most_bytes = SMALL_REPLY + 8 * size

    def install(self) -> None:
        """Put this into the Grid that a ServerApp of this process gets."""
        grid: Any = importlib.import_module("flwr.superlink.grid.http_grid")
        _check_parts(grid, "pull_objects", "inflate_object_from_contents", "ObjectPullError")
        grid.pull_objects, grid.inflate_object_from_contents = self.bounded(
            grid.pull_objects, grid.inflate_object_from_contents, grid.ObjectPullError
        )

    def bounded(
        self, pull: Callable[..., Any], inflate: Callable[..., Any], failure: type[Exception]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return Flower's two functions, which pull a reply's parts and put it together, bounded.

        Args:
            pull: Takes the parts' names, the reply's own last, and a function that gets a part.
            inflate: Takes a name and the parts.
            failure: What `pull` raises to turn the reply into an error.
        """
        plain = {"__init__": Exception.__init__, "__str__": Exception.__str__}  # only the reason
        refusal: Any = type("Refusal", (failure,), plain)
        whole: dict[str, Any] = {}

        def pull_some(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> Any:
            counted, count = threading.Lock(), 0

            def get(name: str) -> bytes:
                nonlocal count
                part = pull_object_fn(name)
                with counted:
                    count += len(part)
                if count > self.most_bytes:
                    raise refusal(f"it has more than {self.most_bytes:,} bytes")
                return part

            parts = pull(object_ids=object_ids, pull_object_fn=get)
            try:
                whole[object_ids[-1]] = inflate(object_ids[-1], parts)
            except Exception as error:
                raise refusal(f"it cannot be read ({type(error).__name__})") from None
            return parts

        return pull_some, lambda message_id, parts: whole.pop(message_id)


def _check_parts(module: Any, *names: str) -> None:
    """Raise unless Flower's module has what is replaced in it."""
    if missing := [name for name in names if not hasattr(module, name)]:
        raise RuntimeError(
            f"flwr {version('flwr')} has no {', '.join(missing)} in {module.__name__}; "
            f"no code of a run is started. Known to work: pip install flwr=={KNOWN_TO_WORK}"
        )


def _readable(content: bytes) -> str:
    """Return a file name by which this process, and no other account, can read the bytes once."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(content)
    return f"/dev/fd/{reading}"


class FlowerCommandError(RuntimeError):
    """Flower's command failed; the message holds what it said."""


@dataclass(frozen=True)
class FlowerCommand:
    """Flower's own command `flwr` for one SuperLink on loopback: adds, removes sites, starts runs.

    It runs inside this process, which saves some seconds a call; its arguments are those that an
    administrator would type.

    Args:
        home: Directory of its configuration, which is written here.
        port: Of the SuperLink, on loopback.
        authority: The certificate that the SuperLink's own is checked against.
    """

    home: Path
    port: int
    authority: Path

    def write_configuration(self) -> None:
        """Write the connection to the SuperLink down where Flower's command looks for it."""
        self.home.mkdir(parents=True, exist_ok=True)
        lines = [
            f"[superlink.{CONNECTION}]",
            f'address = "127.0.0.1:{self.port}"',
            f"root-certificates = {json.dumps(str(self.authority))}",
            "",
        ]
        (self.home / "config.toml").write_text("\n".join(lines), encoding="utf-8")

    def register(self, public_key: Path) -> int:
        """Register a SuperNode, and return its number."""
        return int(self._call("supernode", "register", str(public_key), CONNECTION)["node-id"])

    def unregister(self, node_id: int) -> None:
        """Remove a SuperNode."""
        self._call("supernode", "unregister", str(node_id), CONNECTION)

    def start(self, app: Path) -> int:
        """Start a run of the app in a directory, and return its number."""
        return int(self._call("run", str(app), CONNECTION)["run-id"])

    def _call(self, *words: str) -> dict[str, Any]:
        from unittest.mock import patch

        from flwr.cli.app import app

        output, variables = io.StringIO(), {"FLWR_HOME": str(self.home), **around_loopback()}
        failed: object = None
        with (
            patch.dict(os.environ, variables),
            patch.object(sys, "__stdout__", output),  # to it, Flower's command prints JSON
            contextlib.redirect_stdout(output),
        ):
            try:
                failed = app([*words, "--format", "json"], standalone_mode=False)
            except (Exception, SystemExit) as error:
                failed = error
        printed = output.getvalue()
        try:
            answer = json.loads(printed[printed.index("{") :])
        except ValueError:
            answer = {}
        if not answer.get("success"):
            text = " ".join(printed.split())
            raise FlowerCommandError(f"flwr {' '.join(words)}: {failed}: {text[-500:]}")
        return dict(answer)


if __name__ == "__main__":
    which = sys.argv.pop(1)
    {"supernode": supernode, "clientapp": clientapp}[which]()
