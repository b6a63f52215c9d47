"""Flower's records over a local socket: a frame of JSON and Flower's protobuf.

    8 bytes   length of what follows, big-endian
    4 bytes   length of the JSON
    JSON      what is not a record
    rest      the records

Nothing in a frame can run, and neither side imports torch for it.
"""

import json
import socket
import struct
from typing import Any

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

MAX_BYTES = (2 << 30) - 1  # protobuf takes no more
Header = dict[str, Any]

_FRAME, _JSON = struct.Struct(">Q"), struct.Struct(">I")
_CHUNK = 1 << 20


class WireError(ValueError):
    """What came is not a frame, or too large a one."""


class CutOffError(WireError):
    """The other side went away in the middle."""


def send(connection: socket.socket, header: Header, records: RecordDict) -> int:
    """Send a frame and return its bytes.

    Args:
        connection: A connected socket.
        header: What is not a record; JSON must be able to hold it.
        records: The records.
    """
    frame = encode(header, records)
    connection.sendall(_FRAME.pack(len(frame)) + frame)
    return _FRAME.size + len(frame)


def receive(connection: socket.socket, *, max_bytes: int = MAX_BYTES) -> tuple[Header, RecordDict]:
    """Receive a frame.

    Raises:
        WireError: If it is longer than `max_bytes`, ends too early, or is no frame.
    """
    (length,) = _FRAME.unpack(_exactly(connection, _FRAME.size))
    if length > max_bytes:
        raise WireError(f"a message of {length} bytes; at most {max_bytes} are taken")
    return decode(_exactly(connection, length))


def encode(header: Header, content: RecordDict) -> bytes:
    """Return a frame without the length before it."""
    text = json.dumps(header).encode()
    block: bytes = recorddict_to_proto(content).SerializeToString()
    return _JSON.pack(len(text)) + text + block


def decode(frame: bytes) -> tuple[Header, RecordDict]:
    """Return what `encode` made a frame of.

    Raises:
        WireError: If it is not a frame.
    """
    try:
        (length,) = _JSON.unpack_from(frame)
        start = _JSON.size + length
        header = dict(json.loads(frame[_JSON.size : start]))
        return header, recorddict_from_proto(ProtoRecordDict.FromString(frame[start:]))
    except (struct.error, DecodeError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"not a message: {error}") from error


def _exactly(connection: socket.socket, length: int) -> bytes:
    """Receive a number of bytes; memory grows with what comes, not with what was announced."""
    received = bytearray()
    while len(received) < length:
        piece = connection.recv(min(_CHUNK, length - len(received)))
        if not piece:
            raise CutOffError(f"the message ended after {len(received)} of {length} bytes")
        received += piece
    return bytes(received)
