"""Adapters to Flower's records and back: one flat array for each dtype, checked against a layout.

An array per tensor costs minutes a round in Flower's deployment; flat arrays cost seconds.
Names and shapes are agreed once, before the first round.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedfora.federated.aggregation.update import RANK_AXES, AdapterState
from fedfora.federated.wire.formats import FORMATS, Format, Row

FLOAT32 = FORMATS["float32"]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of an adapter, in the order in which they travel."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, update: AdapterState) -> "Layout":
        """Return the layout of an adapter, with its names sorted."""
        return cls(tuple((name, tuple(update[name].shape)) for name in sorted(update)))

    @classmethod
    def from_json(cls, text: str) -> "Layout":
        """Parse what `to_json` wrote."""
        return cls(tuple((name, tuple(shape)) for name, shape in json.loads(text)))

    def to_json(self) -> str:
        """Return the layout as JSON."""
        return json.dumps(self.shapes, separators=(",", ":"))

    def only(self, factors: str) -> "Layout":
        """Return the layout of some factors, e.g. "AD"."""
        return Layout(tuple(item for item in self.shapes if item[0].rpartition(".")[2] in factors))

    def at_rank(self, rank: int) -> "Layout":
        """Return the layout of the same adapter with another rank."""
        shapes = []
        for name, shape in self.shapes:
            axes = RANK_AXES[name.rpartition(".")[2]]
            shapes.append((name, tuple(rank if i in axes else n for i, n in enumerate(shape))))
        return Layout(tuple(shapes))

    @property
    def digest(self) -> str:
        """A short digest that differs for every other layout."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(math.prod(shape) for _, shape in self.shapes)


def digest_of(update: AdapterState, layout: Layout) -> str:
    """Return a digest of an adapter's names, shapes and float32 numbers, to the bit."""
    content = layout.to_json().encode() + flatten(update, layout).tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def pack(update: AdapterState, layout: Layout, form: Format = FLOAT32) -> ArrayRecord:
    """Return the adapter as flat arrays."""
    return _record(form.encode(flatten(update, layout)))


def unpack(record: ArrayRecord, layout: Layout, form: Format = FLOAT32) -> AdapterState:
    """Return the adapter from its flat arrays.

    Raises:
        ValueError: If the arrays are not those of the layout in that format, or not all finite.
    """
    arrays = {name: array.numpy() for name, array in record.items()}
    return unflatten(form.decode(arrays, layout.size), layout)


def pack_with_feedback(
    update: AdapterState, reference: AdapterState, lost: Row | None, layout: Layout, form: Format
) -> tuple[ArrayRecord, Row | None]:
    """Return what travels of an adapter, and what its format lost.

    A format that loses nothing sends the adapter as it is; another sends its difference from the
    reference, with what was lost before added to it.

    Args:
        update: The adapter.
        reference: What the receiver takes the difference from.
        lost: The second value of the last call; None at first.
        layout: Layout of both.
        form: Travel format.
    """
    if not form.lossy:
        return pack(update, layout), None
    row = flatten(update, layout) - flatten(reference, layout)
    if lost is not None:
        row = row + lost
    arrays = form.encode(row)
    return _record(arrays), row - form.decode(arrays, layout.size)


def unpack_from(
    record: ArrayRecord, reference: AdapterState, layout: Layout, form: Format
) -> AdapterState:
    """Return the adapter that `pack_with_feedback` packed.

    Raises:
        ValueError: As `unpack`.
    """
    received = unpack(record, layout, form)
    if not form.lossy:
        return received
    return {name: reference[name] + value for name, value in received.items()}


def flatten(update: AdapterState, layout: Layout) -> Row:
    """Return all numbers in the order of the layout."""
    pieces = [update[name].float().numpy().ravel() for name, _ in layout.shapes]
    return np.concatenate([np.zeros(0, np.float32), *pieces])


def unflatten(row: Row, layout: Layout) -> AdapterState:
    """Return the tensors of a row."""
    sizes = [math.prod(shape) for _, shape in layout.shapes]
    pieces = torch.split(torch.from_numpy(row.copy()), sizes)
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(layout.shapes, pieces, strict=True)
    }


def payload_bytes(record: ArrayRecord) -> int:
    """Return the bytes of a record's arrays as they travel."""
    return sum(len(array.data) for array in record.values())


def _record(arrays: dict[str, np.ndarray]) -> ArrayRecord:  # type: ignore[type-arg]
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})
