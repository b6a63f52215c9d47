"""A mask: as many uniform words as a vector has, from a seed of 256 bits.

AES-256 in counter mode over zeros, from `cryptography`. A seed is used for one mask only, so the
counter may start at zero. Flower's own secure aggregation seeds a Mersenne twister with 32 bits,
which two cores try out in minutes; here there is nothing to try out.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedfora.federated.secure_aggregation.fixed_point import Words

SEED_BYTES = 32
BLOCK_WORDS = 2**16  # small enough to stay in the processor's cache


def add_mask(vector: Words, seed: bytes) -> None:
    """Add the seed's mask to a vector in place, modulo 2^32."""
    _apply(vector, seed, np.add)


def subtract_mask(vector: Words, seed: bytes) -> None:
    """Take the seed's mask off a vector in place, modulo 2^32."""
    _apply(vector, seed, np.subtract)


def _apply(vector: Words, seed: bytes, operation: np.ufunc) -> None:
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a mask's seed has {SEED_BYTES} bytes, got {len(seed)}")
    keystream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = bytes(4 * BLOCK_WORDS), bytearray(4 * BLOCK_WORDS)
    mask = np.frombuffer(buffer, dtype="<u4")
    for start in range(0, len(vector), BLOCK_WORDS):
        block = vector[start : start + BLOCK_WORDS]
        keystream.update_into(zeros, buffer)
        operation(block, mask[: len(block)], out=block)
