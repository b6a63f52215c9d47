"""Flower's records over a local socket: a frame of JSON and safetensors, nothing that can run.

    8 bytes   length of what follows, big-endian
    4 bytes   length of the JSON
    JSON      {"head": {...}, "records": [[name, kind, content], ...]}
    rest      the arrays, as one safetensors block

An ArrayRecord's content is the list of its arrays' names; array j of record i is called "i.j" in
the block. Bytes in a ConfigRecord travel in base64. Neither side imports torch for it.
"""

import base64
import json
import socket
import struct
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

MAX_BYTES = 2 << 30
Header = dict[str, Any]

_FRAME, _JSON = struct.Struct(">Q"), struct.Struct(">I")
_CHUNK = 1 << 20
_BYTES = "base64"  # key of an object that stands for bytes


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
    arrays = {
        f"{i}.{j}": array.numpy()
        for i, record in enumerate(content.values())
        if isinstance(record, ArrayRecord)
        for j, array in enumerate(record.values())
    }
    records = [[name, *_described(record)] for name, record in content.items()]
    text = json.dumps({"head": header, "records": records}).encode()
    block: bytes = save(arrays)
    return _JSON.pack(len(text)) + text + block


def decode(frame: bytes) -> tuple[Header, RecordDict]:
    """Return what `encode` made a frame of.

    Raises:
        WireError: If it is none.
    """
    try:
        (length,) = _JSON.unpack_from(frame)
        start = _JSON.size + length
        message = json.loads(frame[_JSON.size : start])
        arrays = load(frame[start:])
        content = RecordDict(
            {
                name: _record(kind, described, i, arrays)
                for i, (name, kind, described) in enumerate(message["records"])
            }
        )
        return dict(message["head"]), content
    except (struct.error, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"not a message: {error}") from error


def _described(record: ArrayRecord | ConfigRecord | MetricRecord) -> tuple[str, Any]:
    if isinstance(record, ArrayRecord):
        return "arrays", list(record)
    if isinstance(record, MetricRecord):
        return "metrics", dict(record)
    return "config", {key: _to_json(value) for key, value in record.items()}


def _record(
    kind: str, described: Any, index: int, arrays: dict[str, Any]
) -> ArrayRecord | ConfigRecord | MetricRecord:
    if kind == "arrays":
        return ArrayRecord(
            {name: Array(arrays[f"{index}.{j}"]) for j, name in enumerate(described)}
        )
    if kind == "metrics":
        return MetricRecord(described)
    if kind == "config":
        return ConfigRecord({key: _from_json(value) for key, value in described.items()})
    raise WireError(f"a record of kind {kind!r}")


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list) and any(isinstance(item, bytes) for item in value):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value[_BYTES], validate=True)
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value


def _exactly(connection: socket.socket, length: int) -> bytes:
    """Receive so many bytes; memory grows with what comes, not with what was announced."""
    received = bytearray()
    while len(received) < length:
        piece = connection.recv(min(_CHUNK, length - len(received)))
        if not piece:
            raise CutOffError(f"the message ended after {len(received)} of {length} bytes")
        received += piece
    return bytes(received)
