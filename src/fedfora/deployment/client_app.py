"""A real site's ClientApp: hands a message's records to the resident trainer, and its answer back.

Flower starts a process for every message, so this one must be light: it imports neither torch nor
transformers, and keeps nothing. Whatever goes wrong, all that leaves the site is a code; the text
stays in the site's log.

The two exchange frames of JSON and Flower's protobuf over a local socket:

    8 bytes   length of what follows, big-endian
    4 bytes   length of the JSON
    JSON      what is not a record
    rest      the records

Nothing in a frame can run, and neither side imports torch for it.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

from fedfora.deployment import journal
from fedfora.deployment.supervisor import TRAINER

SOCKET = "trainer.sock"
EPSILON = "epsilon"  # in an answer's head: what the site's ledger has spent by now
ANSWER_S = "answer-s"  # in a message's head: how many seconds the caller waits for the answer
CONNECT_S = 60.0  # a trainer that is being restarted may take this long to listen again
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
CODES = frozenset(  # what failed: all that a site says about it
    {
        *("MESSAGE", "SETTINGS", "BASE", "DATA", "FACTORS", "BUDGET", "MEMORY", "DISK"),
        "TRAINER",  # the trainer does not answer, or ended while it worked
        *map(str.upper, OPERATIONS),  # the operation failed in another way
        *(f"POLICY_{key}" for key in ("BASE", "ROUNDS", "RANK", "STEPS", "HOURS", "UNTIL")),
        *("POLICY_RULES", "POLICY_FILE"),
    }
)
MAX_BYTES = (2 << 30) - 1  # of a frame; protobuf takes no more
Header = dict[str, Any]

_FRAME, _JSON = struct.Struct(">Q"), struct.Struct(">I")
_CHUNK = 1 << 20
_FORM = re.compile(r"site-error ([A-Z_]+) [0-9a-f]{6}")

logger = logging.getLogger(__name__)


class TrainerGoneError(Exception):
    """No trainer answers."""


def make_app() -> ClientApp:
    """Return the app; every kind of message goes to the trainer."""
    app = ClientApp()
    for operation, message_type in OPERATIONS.items():
        category, *action = message_type.split(".")
        getattr(app, category)(*action)(partial(forward, operation))
    return app


def forward(operation: str, message: Message, context: Context) -> Message:
    """Return the trainer's answer to a message, or an error that holds a code and nothing else.

    The site's journal records it before it leaves; if it cannot be recorded, only a code leaves.
    """
    directory = Path(str(context.node_config[TRAINER]))
    settings = dict(context.run_config)
    facts: dict[str, Any] = {"id": message.metadata.message_id, "operation": operation}
    facts["run"] = str(settings.get(journal.RUN_NAME, context.run_id))
    wait_s = message.metadata.ttl
    try:
        if isinstance(index := message.content.get("config", {}).get("round-index"), int):
            facts["round"] = index + 1
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
    """Return a digest of a run's settings, which the journal holds once."""
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()  # whole: it must not fit two settings
    path = directory / journal.JOURNAL
    line = f'"event": "settings", "digest": "{digest}"'  # no run's name holds such quotes
    if not path.is_file() or line.encode() not in path.read_bytes():
        journal.append(directory, "settings", digest=digest, settings=settings)
    return digest


def ask(
    directory: Path,
    head: Header,
    content: RecordDict,
    *,
    connect_s: float = CONNECT_S,
    answer_s: float | None = None,
) -> tuple[Header, RecordDict]:
    """Send a message to the trainer whose socket is in a directory, and return its answer.

    Raises:
        TrainerGoneError: If it does not listen within `connect_s` seconds, goes away at work, or
            is silent for `answer_s` seconds.
        WireError: If its answer is not a message.
    """
    with _connected(directory, connect_s) as connection:
        connection.settimeout(answer_s)
        try:
            # Even a message that it refuses to read to its end is answered.
            with contextlib.suppress(BrokenPipeError):
                send(connection, head, content)
            return receive(connection)
        except (OSError, CutOffError) as error:
            raise TrainerGoneError(f"the trainer went away: {error}") from error


def _connected(directory: Path, wait_s: float) -> socket.socket:
    give_up = time.monotonic() + wait_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_path(directory) as path:
                connection.connect(path)
        except OSError as error:
            connection.close()
            if time.monotonic() > give_up:
                raise TrainerGoneError(f"no trainer listens in {directory}: {error}") from error
            time.sleep(RETRY_S)
        else:
            return connection


@contextlib.contextmanager
def socket_path(directory: Path) -> Iterator[str]:
    """Give the socket's path via the open directory: a path may have only 107 characters."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


class WireError(ValueError):
    """What arrived is not a frame, or is too large."""


class CutOffError(WireError):
    """The other side went away in the middle of a frame."""


def send(connection: socket.socket, header: Header, records: RecordDict) -> int:
    """Send a frame, of a header that JSON can hold and of records, and return its bytes."""
    frame = encode(header, records)
    connection.sendall(_FRAME.pack(len(frame)) + frame)
    return _FRAME.size + len(frame)


def receive(connection: socket.socket, *, max_bytes: int = MAX_BYTES) -> tuple[Header, RecordDict]:
    """Receive a frame.

    Raises:
        WireError: If it is longer than `max_bytes`, ends too early, or is not a frame.
    """
    (length,) = _FRAME.unpack(_exactly(connection, _FRAME.size))
    if length > max_bytes:
        raise WireError(f"a message of {length} bytes; at most {max_bytes} are accepted")
    return decode(_exactly(connection, length))


def encode(header: Header, content: RecordDict) -> bytes:
    """Return a frame without the length before it."""
    text = json.dumps(header).encode()
    block: bytes = recorddict_to_proto(content).SerializeToString()
    return _JSON.pack(len(text)) + text + block


def decode(frame: bytes) -> tuple[Header, RecordDict]:
    """Return what `encode` put into a frame; raise if it is not a frame."""
    try:
        (length,) = _JSON.unpack_from(frame)
        start = _JSON.size + length
        header = dict(json.loads(frame[_JSON.size : start]))
        return header, recorddict_from_proto(ProtoRecordDict.FromString(frame[start:]))
    except (struct.error, DecodeError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"not a message: {error}") from error


def _exactly(connection: socket.socket, length: int) -> bytes:
    """Receive a number of bytes; memory grows with what arrives, not with what was announced."""
    received = bytearray()
    while len(received) < length:
        piece = connection.recv(min(_CHUNK, length - len(received)))
        if not piece:
            raise CutOffError(f"the message ended after {len(received)} of {length} bytes")
        received += piece
    return bytes(received)


def new_code(word: str) -> str:
    """Return what a site says about a failure: a word of `CODES`, a closed list, and a number.

    The number finds the entry in the site's own log; it is random, and says nothing else.
    """
    assert word in CODES, word
    return f"site-error {word} {secrets.token_hex(3)}"


def validated_code(code: str) -> str:
    """Return a code unchanged; for anything else, a code that says nothing."""
    match = _FORM.fullmatch(code)
    return code if match and match[1] in CODES else new_code("MESSAGE")


app = make_app()
