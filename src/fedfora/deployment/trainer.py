"""The resident trainer of a real site: base and rows stay in memory while messages come and go.

It hosts the ClientApp of the simulation, so a deployed site does what a simulated one does. It
listens on a UNIX socket that only its own user may open, and knows a closed set of operations. The
run's settings come with each message; what names a path, a model or a device comes from the site's
kit alone.

What the site keeps from round to round is under `state/runs`, one directory for each run, and is
found again by a trainer that was restarted.
"""

import errno
import hashlib
import json
import logging
import math
import os
import socket
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from fedfora.config import Scalar
from fedfora.data.loading import DataError
from fedfora.deployment import client_app
from fedfora.deployment.client_app import ANSWER_S, OPERATIONS, SOCKET
from fedfora.deployment.journal import RUN_NAME, rounds_answered
from fedfora.deployment.kit import SiteKit
from fedfora.deployment.policy import Policy, PolicyError, read_policy
from fedfora.deployment.settings import check_sent
from fedfora.deployment.supervisor import HEARTBEAT, Heartbeat, only_one
from fedfora.federated.embedded import introduce_this_process
from fedfora.federated.settings import from_run_config
from fedfora.federated.settings_scope import as_scalar, at_site
from fedfora.federated.site.client_app import make_client_app
from fedfora.federated.site.identity import SIGNING_KEY, SITE_KEYS, SITE_STATE
from fedfora.federated.site_runtime import (
    SITE_LEDGER,
    SITE_NAME,
    SiteRuntime,
    load_runtime,
    site_of,
)
from fedfora.federated.wire.messages import CONFIG, FrozenFactorsMissingError
from fedfora.privacy.ledger import BudgetSpent, ledger_directory
from fedfora.reporting.record import write_text

LAST_RUN = "last-run.json"
SILENCE_S = 60.0  # a peer that connects and says nothing for this long is cut off

logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """The run's settings cannot be used here."""


class BaseError(RuntimeError):
    """The base model cannot be opened."""


@dataclass
class Trainer:
    """One site's training, for the process that runs its federation.

    Args:
        name: The site's name.
        index: Its number in the federation; seeds derive from it.
        own: The settings of the site's administrator.
        state: Directory of what it keeps.
        keys: Its signing key, and the public keys of all sites; for secure aggregation.
        base_fingerprint: Of the only base that it accepts; None for any.
    """

    name: str
    index: int
    own: dict[str, Scalar]
    state: Path
    keys: tuple[Path, Path] | None = None
    base_fingerprint: str | None = None
    heartbeat: Heartbeat = field(init=False)
    _contexts: dict[int, Context] = field(default_factory=dict)
    _answered: int = 0  # rounds, including one that the journal does not hold yet

    def __post_init__(self) -> None:
        introduce_this_process()
        self.heartbeat = Heartbeat(self.state / HEARTBEAT)
        self._app = make_client_app()

    def answer(
        self, head: client_app.Header, content: RecordDict
    ) -> tuple[client_app.Header, RecordDict]:
        """Do what is asked; if anything goes wrong, the answer is a code and the text is logged."""
        operation = head.get("operation")
        try:
            if operation not in OPERATIONS:
                raise client_app.WireError(f"no such operation: {operation!r}")
            return self._do(str(operation), head, content)
        except Exception as error:
            code = client_app.new_code(word_for(error, str(operation)))
            logger.exception("%s: %s", code, operation)
            return {client_app.CODE: code}, RecordDict()

    def warm_up(self) -> None:
        """Open base and rows of the last run, so that a restarted trainer answers at once."""
        path = self.state / LAST_RUN
        if not path.is_file():
            return
        try:
            load_runtime(json.loads(path.read_text(encoding="utf-8")))
        except Exception:
            logger.exception("the last run's base could not be opened ahead of time")

    def _do(
        self, operation: str, head: client_app.Header, content: RecordDict
    ) -> tuple[client_app.Header, RecordDict]:
        run_config = self._settings(head["settings"], str(head["run"]))
        policy, answered = self._policy(), max(self._answered, rounds_answered(self.state))
        policy.check(
            from_run_config(run_config),
            operation,
            dict(content.get(CONFIG, {})),
            answered=answered,
            now=datetime.now(),
        )
        context = self._context(int(head["run"]), run_config)
        policy.check_base(self._open(run_config).base_fingerprint)
        site_of(self._open(run_config), context.node_config)  # opened once, however long it takes
        message = Message(content, dst_node_id=1, message_type=OPERATIONS[operation])
        message.metadata.__dict__["_message_id"] = "1"  # as Flower's own grids do
        limit_s = float(head.get(ANSWER_S, math.inf))
        logger.info("%s, for %g s at most", operation, limit_s)
        with self.heartbeat.during(limit_s):
            reply = self._app(message, context).content
        self._answered = answered + (operation == "train")
        return self._spent(run_config), reply

    def _policy(self) -> Policy:
        """Return the site's current policy; one that cannot be read allows nothing."""
        try:
            return read_policy(self.state.parent)
        except ValueError as error:
            raise PolicyError("file", str(error)) from error

    def _spent(self, run_config: dict[str, Scalar]) -> client_app.Header:
        """Return the epsilon that the site's ledger has spent so far, for its journal."""
        privacy = from_run_config(run_config).privacy
        path = ledger_directory(privacy) / f"{SITE_LEDGER}.json"
        if privacy.privacy_unit == "none" or not path.is_file():
            return {}
        return {client_app.EPSILON: json.loads(path.read_text(encoding="utf-8"))["epsilon"]}

    def _settings(self, received: dict[str, Scalar], run_id: str) -> dict[str, Scalar]:
        """Return a run's settings at this site, which alone decides where it keeps things."""
        try:
            received = dict(received)
            check_sent(received, self.own)
            run_name = str(received.pop(RUN_NAME, run_id))
            directory = hashlib.sha256(run_name.encode()).hexdigest()[:16]
            run_config = {
                "privacy_dir": str(self.state / "privacy"),
                **at_site(received, self.own),
                "output_dir": str(self.state / "runs" / directory),
            }
            from_run_config(run_config)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        return run_config

    def _open(self, run_config: dict[str, Scalar]) -> SiteRuntime:
        """Open the base; it stays open until a run has other settings."""
        try:
            runtime = load_runtime(run_config)
        except (ValueError, OSError) as error:
            raise BaseError(str(error)) from error
        actual = runtime.base_fingerprint
        if self.base_fingerprint not in (None, actual):
            raise BaseError(f"the base is {actual}, but the kit requires {self.base_fingerprint}")
        write_text(self.state / LAST_RUN, json.dumps(run_config, indent=1))
        return runtime

    def _context(self, run_id: int, run_config: dict[str, Scalar]) -> Context:
        """Return Flower's context of a run; keys of secure aggregation live in it, and only here.

        Only the newest run has one: a trainer serves one federation. Its settings are these.
        """
        node_config: dict[str, Scalar] = {"partition-id": self.index, SITE_NAME: self.name}
        if self.keys and from_run_config(run_config).secure.secure_aggregation:
            files = map(str, (*self.keys, self.state))
            node_config |= dict(zip((SIGNING_KEY, SITE_KEYS, SITE_STATE), files, strict=True))
        if run_id not in self._contexts:
            self._contexts = {run_id: Context(run_id, 1, {}, RecordDict(), {})}
        context = self._contexts[run_id]
        context.node_config, context.run_config = node_config, run_config
        return context


def word_for(error: Exception, operation: str) -> str:
    """Return which word of the closed list stands for an error."""
    import torch

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "DISK"
    words: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (client_app.WireError, "MESSAGE"),
        (SettingsError, "SETTINGS"),
        (BaseError, "BASE"),
        (DataError, "DATA"),
        (FrozenFactorsMissingError, "FACTORS"),
        (BudgetSpent, "BUDGET"),
        (PolicyError, f"POLICY_{getattr(error, 'key', '').upper()}"),
        ((MemoryError, torch.OutOfMemoryError), "MEMORY"),
    ]
    for kind, word in words:
        if isinstance(error, kind):
            return word
    return operation.upper() if operation in OPERATIONS else "MESSAGE"


def serve_site(kit: SiteKit) -> None:
    """Serve the site of a kit, forever."""
    own = {name: as_scalar(value) for name, value in kit.settings.items()}
    keys = (kit.signing_key, kit.site_keys)
    serve(Trainer(kit.name, kit.index, own, kit.state, keys, kit.base_fingerprint))


def serve(trainer: Trainer, *, max_bytes: int = client_app.MAX_BYTES) -> None:
    """Listen in the trainer's state directory forever.

    Raises:
        ValueError: If another trainer runs there.
    """
    with only_one(trainer.state, "trainer.lock"), _listening(trainer.state) as listener:
        trainer.heartbeat.start()
        trainer.warm_up()
        logger.info("%s listens", trainer.name)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(SILENCE_S)
                _converse(connection, trainer, max_bytes)


def _converse(connection: socket.socket, trainer: Trainer, max_bytes: int) -> None:
    """Answer one message; the asker may be gone by then."""
    try:
        try:
            answer = trainer.answer(*client_app.receive(connection, max_bytes=max_bytes))
        except client_app.WireError:
            code = client_app.new_code("MESSAGE")
            logger.exception("%s", code)
            answer = {client_app.CODE: code}, RecordDict()
        client_app.send(connection, *answer)
    except OSError:
        logger.exception("the process that asked went away")


def _listening(directory: Path) -> socket.socket:
    """Return a socket that only this account may open, and those it shares the directory with."""
    (directory / SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with client_app.socket_path(directory) as path:
            listener.bind(path)
        (directory / SOCKET).chmod(0o600 | directory.stat().st_mode & 0o020)
    finally:
        os.umask(before)
    listener.listen()
    return listener
