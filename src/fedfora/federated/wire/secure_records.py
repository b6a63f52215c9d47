"""The messages of secure aggregation, and a site's memory of it, as Flower's records and back.

A message is one value of `fedfora.federated.secure_aggregation`, written as JSON beside a list of
bytes. What arrives is read strictly against the value's type, so nothing else gets in.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from flwr.app import ArrayRecord, ConfigRecord

from fedfora.config import Scalar
from fedfora.federated.aggregation.update import AdapterState
from fedfora.federated.secure_aggregation.fixed_point import Words
from fedfora.federated.wire.transport import Layout, flatten

INTRODUCE, SHARE = "query.introduce", "query.share"
CONFIRM, REVEAL = "query.confirm", "query.reveal"
# Records of a message: to a site, and from one.
TERMS, ROSTER, DELIVERY = "terms", "roster", "delivery"
SURVIVORS, SIGNATURES = "survivors", "signatures"
ANSWER, WORDS = "answer", "words"


def digest_of_task(
    rule: str, base: str, received: AdapterState, run_config: Mapping[str, Scalar]
) -> bytes:
    """Return 32 bytes that differ for every other rule, base's fingerprint, adapter or settings."""
    layout = Layout.of(received)
    text = json.dumps([rule, base, layout.shapes, sorted(run_config.items())])
    return hashlib.sha256(text.encode() + b"\0" + flatten(received, layout).tobytes()).digest()


def write(value: Any) -> ConfigRecord:
    """Return a value of the protocol as it travels, or is stored in a site's memory."""
    pieces: list[bytes] = []
    return ConfigRecord({"json": json.dumps(_plain(value, pieces)), "bytes": pieces})


def read(kind: Any, record: ConfigRecord) -> Any:
    """Return the inverse of `write`.

    Args:
        kind: The value's type, e.g. `Terms` or `dict[int, bytes]`.
        record: What came.

    Raises:
        ValueError: If it is not a value of this type.
    """
    try:
        return _typed(kind, json.loads(str(record["json"])), record["bytes"])
    except (AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"not what secure aggregation expects: {error}") from error


def read_words(record: ArrayRecord, size: int) -> Words:
    """Return the masked words of a site; raise if they are not `size` words."""
    if list(record) != [WORDS]:
        raise ValueError(f"arrays: expected {[WORDS]}, got {list(record)[:10]}")
    array = record[WORDS]
    header = 256  # more than numpy writes before the numbers
    if (
        array.dtype != "uint32"
        or tuple(array.shape) != (size,)
        or (len(array.data) > 4 * size + header)
    ):
        raise ValueError(
            f"expected {size} uint32 words, got {array.dtype} of shape {tuple(array.shape)} in "
            f"{len(array.data)} bytes"
        )
    words: Words = array.numpy()
    return words


def _plain(value: Any, pieces: list[bytes]) -> Any:
    """Return what JSON can hold; bytes go to `pieces`, and are referred to by their index."""
    if isinstance(value, bytes):
        pieces.append(value)
        return len(pieces) - 1
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), pieces) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item, pieces) for key, item in value.items()}
    return value


def _typed(kind: Any, value: Any, pieces: Any) -> Any:
    """Return a value of a type from what `_plain` made of it; anything else is an error."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        if set(value) != set(hints):
            raise ValueError(f"{kind.__name__} has {sorted(hints)}, not {sorted(value)[:10]}")
        typed = {name: _typed(hint, value[name], pieces) for name, hint in hints.items()}
        return kind(**typed)
    if get_origin(kind) is dict:
        item_kind = get_args(kind)[1]
        return {int(key): _typed(item_kind, item, pieces) for key, item in value.items()}
    if get_origin(kind) is tuple:
        return tuple(_typed(get_args(kind)[0], item, pieces) for item in value)
    if get_origin(kind) is UnionType:  # of something and None
        return None if value is None else _typed(get_args(kind)[0], value, pieces)
    value = pieces[value] if kind is bytes else value
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
