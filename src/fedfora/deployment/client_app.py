"""A real site's ClientApp: hands a message's records to the resident trainer, and its answer back.

Flower starts a process for every message, so this one must be light: it imports neither torch nor
transformers, and holds nothing. Whatever goes wrong, all that leaves the site is a code; the text
stays in the site's log.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedfora.deployment import journal, socket_wire
from fedfora.deployment.heartbeat import TRAINER

SOCKET = "trainer.sock"
EPSILON = "epsilon"  # in an answer's head: what the site's ledger has spent by now
ANSWER_S = "answer-s"  # in a message's head: for so many seconds somebody waits for the answer
CONNECT_S = 60.0  # a trainer that is being restarted may take so long to listen again
RETRY_S = 0.2
OPERATIONS = {  # of the trainer, and the type of Flower's message for each
    "describe": "query",
    "train": "train",
    "evaluate": "evaluate",
    "introduce": "query.introduce",
    "share": "query.share",
    "confirm": "query.confirm",
    "reveal": "query.reveal",
}
RAISED = 2  # Flower's error code for an exception in a ClientApp
CODE = "code"  # in an answer's head: what failed, as `new_code` says it
CODES = {
    "MESSAGE": "the message was not one, or too large",
    "TRAINER": "the site's trainer does not answer, or ended while it worked",
    "SETTINGS": "the run's settings cannot be used at the site",
    "BASE": "the base model cannot be opened",
    "DATA": "the rows cannot be read",
    "FACTORS": "the site lacks frozen factors that the coordinator takes it to have",
    "BUDGET": "the site's privacy budget is spent",
    **{
        f"POLICY_{key}": f"the site's policy ({key.lower()}) does not allow what was asked for"
        for key in ("BASE", "ROUNDS", "RANK", "STEPS", "HOURS", "UNTIL", "RULES", "FILE")
    },
    "MEMORY": "there is not enough memory",
    "DISK": "there is no room on the disk",
    "DESCRIBE": "the site could not start",
    "TRAIN": "the training failed",
    "EVALUATE": "the evaluation failed",
    "INTRODUCE": "secure aggregation: no key",
    "SHARE": "secure aggregation: no shares",
    "CONFIRM": "secure aggregation: the list of survivors is not confirmed",
    "REVEAL": "secure aggregation: nothing revealed",
}
_FORM = re.compile(r"site-error ([A-Z_]+) [0-9a-f]{6}")

logger = logging.getLogger(__name__)


class TrainerGoneError(Exception):
    """There is no trainer to speak to."""


def make_app() -> ClientApp:
    """Return the app; every kind of message goes to the trainer."""
    app = ClientApp()
    for operation, message_type in OPERATIONS.items():
        category, *action = message_type.split(".")
        getattr(app, category)(*action)(_forwarding(operation))
    return app


def _forwarding(operation: str) -> Callable[[Message, Context], Message]:
    return lambda message, context: forward(operation, message, context)


def forward(operation: str, message: Message, context: Context) -> Message:
    """Return the trainer's answer to a message, or an error that holds a code and nothing else.

    The site's journal has it before it leaves; where it cannot be written, only a code leaves.
    """
    directory = Path(str(context.node_config[TRAINER]))
    settings = dict(context.run_config)
    facts = {"id": message.metadata.message_id, "operation": operation}
    facts["run"] = str(settings.get(journal.RUN_NAME, context.run_id))
    facts["round"] = _round(message.content)
    wait_s = message.metadata.ttl
    try:
        head = {"operation": operation, "run": context.run_id, "settings": settings}
        head, content = ask(directory, {**head, ANSWER_S: wait_s}, message.content, answer_s=wait_s)
        if CODE not in head:
            facts |= {"settings": _written_down(directory, settings), "epsilon": head.get(EPSILON)}
            facts |= measured(content)
            journal.append(directory, journal.SENT, **facts)
            return Message(content, reply_to=message)
        reason = validated_code(str(head[CODE]))
    except TrainerGoneError:
        logger.exception("the trainer does not answer")
        reason = new_code("TRAINER")
    except OSError:
        logger.exception("the journal cannot be written, so the answer stays here")
        reason = new_code(journal.UNWRITTEN)
    except Exception:
        logger.exception("the message could not be passed on")
        reason = new_code("MESSAGE")
    try:
        journal.append(directory, journal.SENT, **facts, error=reason)
    except OSError:
        reason = new_code(journal.UNWRITTEN)
    return Message(Error(RAISED, reason), reply_to=message)


def measured(content: RecordDict) -> dict[str, Any]:
    """Return size and digest of an answer, the same at the site and at the coordinator."""
    arrays = [a for r in content.values() if isinstance(r, ArrayRecord) for a in r.values()]
    return {"bytes": sum(len(array.data) for array in arrays), "digest": content.object_id}


def _written_down(directory: Path, settings: dict[str, Any]) -> str:
    """Return a digest of a run's settings, which stand in the journal once."""
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = directory / journal.JOURNAL
    if not path.is_file() or digest.encode() not in path.read_bytes():
        journal.append(directory, "settings", digest=digest, settings=settings)
    return digest


def _round(content: RecordDict) -> int | None:
    """Return the round that a message asks for; None where it asks for none."""
    index = content.get("config", {}).get("round-index")
    return index + 1 if isinstance(index, int) else None


def ask(
    directory: Path,
    head: socket_wire.Header,
    content: RecordDict,
    *,
    connect_s: float = CONNECT_S,
    answer_s: float | None = None,
) -> tuple[socket_wire.Header, RecordDict]:
    """Send a message to the trainer whose socket lies in a directory, and return its answer.

    Raises:
        TrainerGoneError: If it does not listen within `connect_s` seconds, goes while it works, or
            is silent for `answer_s` seconds.
        wire.WireError: If what it answers is no message.
    """
    with _connected(directory, connect_s) as connection:
        connection.settimeout(answer_s)
        try:
            # A message that it would not read to its end is answered all the same.
            with contextlib.suppress(BrokenPipeError):
                socket_wire.send(connection, head, content)
            return socket_wire.receive(connection)
        except (OSError, socket_wire.CutOffError) as error:
            raise TrainerGoneError(f"the trainer went away: {error}") from error


def _connected(directory: Path, wait_s: float) -> socket.socket:
    give_up = time.monotonic() + wait_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect(connection, directory)
        except OSError as error:
            connection.close()
            if time.monotonic() > give_up:
                raise TrainerGoneError(f"no trainer listens in {directory}: {error}") from error
            time.sleep(RETRY_S)
        else:
            return connection


def _connect(connection: socket.socket, directory: Path) -> None:
    """Connect by way of the open directory: a socket's own path may have 107 characters at most."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        connection.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
    finally:
        os.close(descriptor)


def new_code(word: str) -> str:
    """Return what a site says of a failure: a word of a closed list, and a number.

    The number finds the entry in the site's own log; it is random, and says nothing else.

    Args:
        word: One of `CODES`.
    """
    assert word in CODES, word
    return f"site-error {word} {secrets.token_hex(3)}"


def validated_code(code: str) -> str:
    """Return a code as it is; of anything else, a code that says nothing."""
    match = _FORM.fullmatch(code)
    return code if match and match[1] in CODES else new_code("MESSAGE")


app = make_app()
