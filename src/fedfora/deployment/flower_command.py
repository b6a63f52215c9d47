"""Flower's own command `flwr`, spoken to a SuperLink on loopback: sites in and out, runs started.

The command runs inside this process, which saves some seconds a call; its words are those that an
administrator would type.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

        said = io.StringIO()
        failed: object = None
        with _variable("FLWR_HOME", str(self.home)), _caught(said):
            try:
                failed = app([*words, "--format", "json"], standalone_mode=False)
            except (Exception, SystemExit) as error:
                failed = error
        answer = _last_object(said.getvalue())
        if not answer.get("success"):
            text = " ".join(said.getvalue().split())
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
def _caught(said: io.StringIO) -> Iterator[None]:
    """Catch what is printed; Flower's command prints JSON to the stream that Python began with."""
    before, sys.__stdout__ = sys.__stdout__, said  # type: ignore[misc, assignment]
    try:
        with contextlib.redirect_stdout(said):
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
