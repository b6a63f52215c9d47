"""A secret of 256 bits in shares, of which a threshold is needed and fewer say nothing.

Shamir's scheme (1979) from pycryptodome, over GF(2^128): each half of the secret is shared by
itself. A share is the two halves' shares side by side; its index is the holder's place, from 1.
"""

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

HALF = 16


def split(secret: bytes, *, threshold: int, num_shares: int) -> list[bytes]:
    """Return the shares; entry i has index i + 1.

    Args:
        secret: 32 bytes.
        threshold: How many shares bring the secret back.
        num_shares: How many shares to make.
    """
    if len(secret) != 2 * HALF or not 1 <= threshold <= num_shares:
        raise ValueError(
            f"expected 32 bytes and a threshold of 1 to {num_shares}, got {len(secret)} bytes and "
            f"{threshold}"
        )
    halves = (
        Shamir.split(threshold, num_shares, half, ssss=False)
        for half in (secret[:HALF], secret[HALF:])
    )
    return [left + right for (_, left), (_, right) in zip(*halves, strict=True)]


def combine(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """Return the secret from shares by index.

    A wrong share gives a wrong secret and no error: whoever combines must be able to check.

    Raises:
        ValueError: If there are fewer shares than the threshold.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, but {threshold} are needed")
    chosen = sorted(shares.items())[:threshold]
    halves = (
        [(index, share[half]) for index, share in chosen]
        for half in (slice(None, HALF), slice(HALF, None))
    )
    return b"".join(Shamir.combine(half, ssss=False) for half in halves)
