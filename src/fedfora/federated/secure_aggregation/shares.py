"""A secret of 256 bits in shares, of which a threshold is needed and fewer say nothing.

Shamir's scheme (1979, https://doi.org/10.1145/359168.359176) over the integers modulo a prime p: a
random polynomial f of degree t - 1 with f(0) the secret; share i is f(i). Python multiplies such
integers natively, so this is some hundred times faster than pycryptodome's scheme over GF(2^128),
which a round of 500 sites kept busy for a minute.
"""

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

BYTES = 32
P = 2**256 - 189  # the largest prime below 2^256


def new_secret() -> bytes:
    """Return 32 random bytes that can be shared: a number below p."""
    return secrets.randbelow(P).to_bytes(BYTES, "big")


def split(secret: bytes, *, threshold: int, num_shares: int) -> list[bytes]:
    """Return the shares; entry i has index i + 1.

    Args:
        secret: 32 bytes, a number below p; all but a share of 2^-248 of them are.
        threshold: How many shares bring the secret back.
        num_shares: How many shares to make.

    Raises:
        ValueError: If the secret is none, or the numbers do not go together.
    """
    if len(secret) != BYTES or not 1 <= threshold <= num_shares:
        raise ValueError(
            f"expected 32 bytes and a threshold of 1 to {num_shares}, got {len(secret)} bytes and "
            f"{threshold}"
        )
    constant = int.from_bytes(secret, "big")
    if constant >= P:
        raise ValueError("a secret must be a number below 2^256 - 189")
    coefficients = [constant, *(secrets.randbelow(P) for _ in range(threshold - 1))]
    return [_at(coefficients, x).to_bytes(BYTES, "big") for x in range(1, num_shares + 1)]


def combine(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """Return the secret from shares by index.

    A wrong share gives a wrong secret and no error: whoever combines must be able to check.

    Raises:
        ValueError: If there are fewer shares than the threshold.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, but {threshold} are needed")
    chosen = sorted(shares)[:threshold]
    weights = _weights(tuple(chosen))
    total = sum(
        weight * int.from_bytes(shares[index], "big")
        for index, weight in zip(chosen, weights, strict=True)
    )
    return (total % P).to_bytes(BYTES, "big")


def _at(coefficients: Sequence[int], x: int) -> int:
    """Return the polynomial's value by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % P
    return value


@lru_cache(maxsize=256)  # most sites of a round have their shares from the same places
def _weights(indices: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights: f(0) is the sum of them times f at the indices."""
    weights = []
    for i in indices:
        above = below = 1
        for j in indices:
            if j != i:
                above = above * j % P
                below = below * (j - i) % P
        weights.append(above * pow(below, -1, P) % P)
    return tuple(weights)
