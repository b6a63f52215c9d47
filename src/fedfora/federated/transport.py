"""Adapters to Flower's records and back: one flat float32 array, checked against a layout.

One array for each tensor costs minutes a round in Flower's deployment; one flat array costs
seconds. Names and shapes are agreed once, before the first round.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedfora.federated.aggregation import Update

KEY = "adapter"


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of an adapter, in the order in which they travel."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, update: Update) -> "Layout":
        """Return the layout of an adapter, with its names sorted."""
        return cls(tuple((name, tuple(update[name].shape)) for name in sorted(update)))

    @classmethod
    def from_json(cls, text: str) -> "Layout":
        """Parse what `to_json` wrote."""
        return cls(tuple((name, tuple(shape)) for name, shape in json.loads(text)))

    def to_json(self) -> str:
        """Return the layout as JSON."""
        return json.dumps(self.shapes, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """A short digest that differs for every other layout."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """Count of numbers."""
        return sum(math.prod(shape) for _, shape in self.shapes)


def pack(update: Update, layout: Layout) -> ArrayRecord:
    """Return the adapter as one flat array."""
    flat = np.concatenate([update[name].float().numpy().ravel() for name, _ in layout.shapes])
    return ArrayRecord({KEY: Array(flat)})


def unpack(record: ArrayRecord, layout: Layout) -> Update:
    """Return the adapter from its flat array.

    Raises:
        ValueError: If the record is not one float32 array of the layout's size, all finite.
    """
    if list(record) != [KEY]:
        raise ValueError(f"expected one array {KEY!r}, got {sorted(record)}")
    flat = record[KEY].numpy()
    if flat.dtype != np.float32 or flat.shape != (layout.size,):
        raise ValueError(
            f"expected {layout.size} float32 numbers, got {flat.dtype} of shape {flat.shape}"
        )
    if not np.isfinite(flat).all():
        raise ValueError("the adapter holds numbers that are not finite")
    sizes = [math.prod(shape) for _, shape in layout.shapes]
    pieces = torch.split(torch.from_numpy(flat.copy()), sizes)
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(layout.shapes, pieces, strict=True)
    }


def payload_bytes(record: ArrayRecord) -> int:
    """Return the bytes of a record's arrays as they travel."""
    return sum(len(array.data) for array in record.values())
