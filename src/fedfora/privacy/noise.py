"""Random numbers that nobody can repeat: the noise and the samples of differential privacy.

An adversary who can guess the noise subtracts it, so it never comes from the run's seed, nor from a
generator of a statistics library, whose state can be computed from its output. Here the bits are
the key stream of AES-256 in counter mode under a key from the operating system, drawn anew for each
`SecretNoise` and never written down.

Not covered: the lowest bits of a float betray a little about the value under the noise (Mironov
2012, https://doi.org/10.1145/2382196.2382264).
"""

import secrets

from fedfora._extras import need
from fedfora._torch import Tensor, torch

KEY_BYTES, NONCE_BYTES = 32, 16


class SecretNoise:
    """A stream of uniform and normal numbers under a secret key."""

    def __init__(self, key: bytes | None = None) -> None:
        """Start a stream.

        Args:
            key: 32 bytes; only tests give one, everybody else leaves it to the operating system.
        """
        ciphers = need("cryptography.hazmat.primitives.ciphers")
        cipher = ciphers.Cipher(
            ciphers.algorithms.AES(key or secrets.token_bytes(KEY_BYTES)),
            ciphers.modes.CTR(bytes(NONCE_BYTES)),
        )
        self._stream = cipher.encryptor()

    def uniform(self, count: int) -> Tensor:
        """Return `count` float64 numbers, uniform in (0, 1) on a grid of 2**-53."""
        raw = bytearray(self._stream.update(bytes(8 * count)))
        if not raw:
            return torch.zeros(0, dtype=torch.float64)
        bits = torch.frombuffer(raw, dtype=torch.int64)
        # The highest 53 bits; the half keeps 0 and 1 out, where the normal quantile is infinite.
        return (((bits >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        """Return float32 numbers of a centered normal distribution, by its quantile function.

        Args:
            shape: Shape of the result.
            std: Standard deviation; 0 gives zeros.
        """
        if std == 0:
            return torch.zeros(shape)
        standard: Tensor = torch.special.ndtri(self.uniform(torch.Size(shape).numel()))
        return (std * standard).float().reshape(shape)

    def sample(self, num_rows: int, rate: float) -> list[int]:
        """Return a Poisson sample: each of `num_rows` indices with probability `rate`, alone."""
        if rate >= 1:
            return list(range(num_rows))
        return torch.nonzero(self.uniform(num_rows) < rate).flatten().tolist()  # type: ignore[no-any-return]
