"""Flower's processes as fedfora starts them: commands, environment, and two small corrections.

`supernode`: Flower's SuperNode stays alive, offline, when its main loop has ended; here its process
ends, so that the supervisor can start it again.

`clientapp`: Flower runs, at every site, the code that came with the run. Here the app that is
installed at the site runs instead, and what came is not even unpacked. Flower finds this program
under its own name in a directory of the kit's state, first on the PATH.
"""

import contextlib
import io
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

SHIM = "flwr-clientapp"
KNOWN_TO_WORK = "1.41.0"  # of Flower: the tests on real processes ran with it


def environment(home: Path) -> dict[str, str]:
    """Return Flower's variables: no telemetry, no update check, its files in `home`, no installs.

    Args:
        home: Directory for Flower's own files.
    """
    scripts = str(Path(sys.executable).parent)
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
    }


def with_own_client(variables: dict[str, str], directory: Path) -> dict[str, str]:
    """Return the variables so that Flower starts the installed client app, and nothing else.

    Args:
        variables: Of the SuperNode.
        directory: Where the program that stands for Flower's is written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / SHIM
    lines = ["#!/bin/sh", f'exec "{sys.executable}" -m {__name__} clientapp "$@"', ""]
    program.write_text("\n".join(lines), encoding="utf-8")
    program.chmod(0o700)
    return {**variables, "PATH": os.pathsep.join([str(directory), variables["PATH"]])}


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def supernode() -> None:
    """Run Flower's SuperNode; its process ends when its main loop does."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    status = 1
    try:
        flower_supernode()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        raise
    finally:
        sys.stdout.flush()
        os._exit(status)


def clientapp() -> None:
    """Run Flower's client process with the app that is installed here.

    Raises:
        RuntimeError: If this version of Flower cannot be told so; then nothing runs at all.
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
    if missing := [name for name in replacements if not hasattr(run_clientapp, name)]:
        raise RuntimeError(
            f"flwr {version('flwr')} has no {', '.join(missing)} in {run_clientapp.__name__}; "
            f"no code of a run is started. Known to work: pip install flwr=={KNOWN_TO_WORK}"
        )
    for name, replacement in replacements.items():
        setattr(run_clientapp, name, replacement)
    # Flower loads its SuperNode beside its client: half of the seconds that a message would wait.
    supernode_module = "flwr.supernode.cli.flower_supernode"
    sys.modules[supernode_module] = ModuleType(supernode_module)
    sys.modules[supernode_module].flower_supernode = None  # type: ignore[attr-defined]
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    flwr_clientapp()


# Flower's own command `flwr`, spoken to a SuperLink on loopback: sites in and out, runs started.
#
# The command runs inside this process, which saves some seconds a call; its words are those that an
# administrator would type.


CONNECTION = "fedfora"


class FlowerCommandError(RuntimeError):
    """Flower's command did not do what it was asked for; the message holds what it said."""


@dataclass(frozen=True)
class FlowerCommand:
    """Flower's command for one SuperLink.

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
        """Let a SuperNode in, and return its number."""
        return int(self._call("supernode", "register", str(public_key), CONNECTION)["node-id"])

    def unregister(self, node_id: int) -> None:
        """Throw a SuperNode out."""
        self._call("supernode", "unregister", str(node_id), CONNECTION)

    def start(self, app: Path) -> int:
        """Start a run of the app in a directory, and return its number."""
        return int(self._call("run", str(app), CONNECTION)["run-id"])

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        self._call("stop", str(run_id), CONNECTION)

    def _call(self, *words: str) -> dict[str, Any]:
        from flwr.cli.app import app

        output = io.StringIO()
        failed: object = None
        with _variable("FLWR_HOME", str(self.home)), _caught(output):
            try:
                failed = app([*words, "--format", "json"], standalone_mode=False)
            except (Exception, SystemExit) as error:
                failed = error
        answer = _last_object(output.getvalue())
        if not answer.get("success"):
            text = " ".join(output.getvalue().split())
            raise FlowerCommandError(f"flwr {' '.join(words)}: {failed}: {text[-500:]}")
        return answer


def _last_object(text: str) -> dict[str, Any]:
    """Return the JSON object at the end of what was printed; empty where there is none."""
    start = text.find("{")
    try:
        answer = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


@contextlib.contextmanager
def _caught(output: io.StringIO) -> Iterator[None]:
    """Catch what is printed; Flower's command prints JSON to the stream that Python began with."""
    before, sys.__stdout__ = sys.__stdout__, output  # type: ignore[misc, assignment]
    try:
        with contextlib.redirect_stdout(output):
            yield
    finally:
        sys.__stdout__ = before  # type: ignore[misc]


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


if __name__ == "__main__":
    which = sys.argv.pop(1)
    {"supernode": supernode, "clientapp": clientapp}[which]()
