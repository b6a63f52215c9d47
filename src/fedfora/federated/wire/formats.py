"""Travel formats: one row of float32 numbers to the arrays that travel, and back.

Fewer bits cause errors. They are kept small by sending the difference from what the receiver has,
and kept from accumulating by error feedback: what a format lost is added to the next row (Seide et
al. 2014; Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847). Arithmetic is in float32.

    sent_t = encode(row_t + lost_t)        lost_{t+1} = row_t + lost_t - decode(sent_t)

int8 and int4 hold, for each group of numbers, codes from -L to L and one float32 scale, the group's
largest magnitude / L; the error of a number is at most half a scale.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 128
Row = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Format:
    """One encoding of numbers.

    Args:
        name: What the user types.
        levels: L for int8 and int4; 0 for floating point.
    """

    name: str
    levels: int = 0

    @property
    def lossy(self) -> bool:
        """Whether encoding changes the numbers."""
        return self.name != "float32"

    def encode(self, row: Row) -> Arrays:
        """Return the arrays that travel, by name."""
        if self.levels:
            return self._encode_groups(row)
        with np.errstate(over="ignore"):
            return {"numbers": row.astype(self.name)}

    def decode(self, arrays: Arrays, size: int) -> Row:
        """Return `size` numbers.

        Raises:
            ValueError: If the arrays are not what `encode` makes of `size` finite numbers.
        """
        for name, (dtype, length) in self.expected(size).items():
            array = arrays.get(name)
            if array is None or array.dtype != dtype or array.shape != (length,):
                found = "nothing" if array is None else f"{array.dtype} of shape {array.shape}"
                raise ValueError(f"expected {length} {dtype} {name}, got {found}")
        if len(arrays) != len(self.expected(size)):
            raise ValueError(f"expected arrays {sorted(self.expected(size))}, got {sorted(arrays)}")
        numbers = arrays["numbers"]
        row = self._decode_groups(arrays, size) if self.levels else numbers.astype(np.float32)
        if not np.isfinite(row).all():
            raise ValueError("the adapter holds numbers that are not finite")
        return row

    def expected(self, size: int) -> dict[str, tuple[np.dtype[Any], int]]:
        """Return dtype and length of each array for `size` numbers."""
        if not self.levels:
            return {"numbers": (np.dtype(self.name), size)}
        kind, codes = ("int8", size) if self.levels > 7 else ("uint8", -(-size // 2))
        return {
            "numbers": (np.dtype(kind), codes),
            "scales": (np.dtype("float32"), -(-size // GROUP)),
        }

    def _encode_groups(self, row: Row) -> Arrays:
        groups = _grouped(row)
        scales = np.abs(groups).max(axis=1, initial=0) / np.float32(self.levels)
        divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
        codes: NDArray[Any] = np.rint(groups / divisors).clip(-self.levels, self.levels)
        codes = codes.astype(np.int8).ravel()[: len(row)]
        if self.levels <= 7:  # two in a byte
            nibbles = np.pad(codes + 8, (0, len(codes) % 2)).astype(np.uint8)
            codes = nibbles[::2] | (nibbles[1::2] << 4).astype(np.uint8)
        return {"numbers": codes, "scales": scales.astype(np.float32)}

    def _decode_groups(self, arrays: Arrays, size: int) -> Row:
        codes = arrays["numbers"]
        if self.levels <= 7:
            nibbles = np.stack([codes & 15, codes >> 4], axis=1).ravel()[:size]
            codes = nibbles.astype(np.int8) - 8
        with np.errstate(over="ignore", invalid="ignore"):
            row = _grouped(codes.astype(np.float32)) * arrays["scales"][:, None]
        return np.asarray(row.ravel()[:size], dtype=np.float32)


_LEVELS = {"float32": 0, "float16": 0, "int8": 127, "int4": 7}
FORMATS = {name: Format(name, levels) for name, levels in _LEVELS.items()}


def _grouped(row: Row) -> Row:
    """Return rows of GROUP numbers, the last padded with zeros."""
    missing = -len(row) % GROUP
    return np.pad(row, (0, missing)).reshape(-1, GROUP)
