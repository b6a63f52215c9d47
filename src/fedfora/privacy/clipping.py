"""Bounded influence: gradients of examples and updates of sites, cut to a norm.

After clipping to C no example (no site) moves a sum by more than C in L2 norm. Normal noise of
standard deviation z C on each number of the sum is then the Gaussian mechanism with noise
multiplier z (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, Alg. 1).

Shape suffixes: B examples, `...` the shape of a parameter.
"""

import secrets
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedfora.registry import need

Tensors = dict[str, Tensor]


def clipped_sum(gradients: Mapping[str, Tensor], clipping_norm: float) -> Tensors:
    """Return the sum over examples of their gradients, each cut to `clipping_norm`.

    The norm of an example is taken over all parameters together, in float32. An example whose
    gradient is not finite is left out: it would erase everybody else's, and a sum without it is
    still one whose every term is at most `clipping_norm` long.

    Args:
        gradients: Parameter name to gradients of shape `(B, ...)`.
        clipping_norm: C, positive; infinite for no clipping.
    """
    flat = [gradient.float().flatten(1) for gradient in gradients.values()]
    norm_B = torch.stack([part.norm(dim=1) for part in flat]).norm(dim=0)
    factor_B = shrink_factor(norm_B, clipping_norm)
    summed = {}
    for (name, gradient), part in zip(gradients.items(), flat, strict=True):
        finite = torch.where((factor_B > 0)[:, None], part, torch.zeros_like(part))
        summed[name] = (factor_B @ finite).reshape(gradient.shape[1:])
    return summed


def clip(update: Mapping[str, Tensor], clipping_norm: float) -> Tensors:
    """Return an update cut to `clipping_norm` over all its tensors together; zeros if not finite.

    Args:
        update: Name to tensor: what a site changed.
        clipping_norm: C, positive; infinite for no clipping.
    """
    norm = torch.stack([tensor.float().norm() for tensor in update.values()]).norm()
    factor = float(shrink_factor(norm[None], clipping_norm))
    if factor == 0:
        return {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    return {name: factor * tensor for name, tensor in update.items()}


def shrink_factor(norm_B: Tensor, clipping_norm: float) -> Tensor:
    """Return min(1, C / norm) for each norm; exactly 1 below C, 0 where the norm is not finite."""
    if not clipping_norm > 0:
        raise ValueError(f"--clipping_norm must be positive, got {clipping_norm}")
    factor_B = torch.where(
        norm_B > clipping_norm, clipping_norm / norm_B.clamp(min=1e-30), torch.ones_like(norm_B)
    )
    return torch.where(torch.isfinite(norm_B), factor_B, torch.zeros_like(norm_B))


# Random numbers that nobody can repeat: the noise and the samples of differential privacy.
# An adversary who can guess the noise subtracts it, so it never comes from the run's seed, nor from
# a generator of a statistics library, whose state can be computed from its output. Here the bits
# are the key stream of AES-256 in counter mode under a key from the operating system, drawn anew
# for each `SecretNoise` and never written down.
# Not covered: the lowest bits of a float betray a little about the value under the noise (Mironov
# 2012, https://doi.org/10.1145/2382196.2382264). Where sums are of integers, `discrete_normal` has
# no such bits: it uses uniform integers alone.

KEY_BYTES, NONCE_BYTES = 32, 16
BLOCK = 2**17  # numbers that are drawn at a time

Integers = NDArray[np.int64]
Truths = NDArray[np.bool_]
Coin = Callable[[Integers], Truths]  # one toss for each of some numbers, named by their places


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
        """Return `count` float64 numbers, uniform in (0, 1) on a grid of 2**-52."""
        raw = bytearray(self._stream.update(bytes(8 * count)))
        if not raw:
            return torch.zeros(0, dtype=torch.float64)
        bits = torch.frombuffer(raw, dtype=torch.int64)
        # The highest 52 bits; the half keeps 0 and 1 out, where the normal quantile is infinite. Of
        # 53 bits, a half more than the largest number would be rounded to 2**53, and so to 1.
        return (((bits >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52

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

    def discrete_normal(self, count: int, std: int) -> Integers:
        """Return integers x with probability proportional to exp(-x^2 / (2 std^2)), exactly.

        By rejection, from coins with rational odds, as in Canonne, Kamath and Steinke 2020
        (https://arxiv.org/abs/2004.00010, Alg. 1 to 3) and Karney 2016
        (https://doi.org/10.1145/2710016): x = std k + u with k >= 0 drawn from exp(-k^2 / 2) and u
        uniform below std, kept with probability exp(-k u / std - u^2 / (2 std^2)), under a random
        sign. No number is rounded. The candidates of a block are tossed for together.

        Args:
            count: How many.
            std: A whole number, at least 1; of the normal distribution, close to that of x.
        """
        kept = [np.zeros(0, dtype=np.int64)]
        while (missing := count - sum(map(len, kept))) > 0:
            kept.append(self._candidates(min(BLOCK, 2 * missing + 16), std)[:missing])
        return np.concatenate(kept)

    def _candidates(self, count: int, std: int) -> Integers:
        """Return what is left of `count` candidates."""

        def half(places: Integers) -> Truths:
            return self._below(2, len(places)) < 1

        def first(places: Integers) -> Truths:
            return self._below(std, len(places)) < part[places]

        def second(places: Integers) -> Truths:
            return half(places) & first(places) & first(places)

        whole, places = np.zeros(count, dtype=np.int64), np.arange(count)
        while len(places):  # as often as exp(-1/2) comes up: k has odds of exp(-k / 2)
            places = places[self._exp_minus(half, places)]
            whole[places] += 1
        places = self._survivors(half, np.arange(count), whole * (whole - 1))  # now exp(-k^2 / 2)
        part = self._below(std, count)
        places = self._survivors(first, places, whole)
        places = places[self._exp_minus(second, places)]
        sign = 1 - 2 * self._below(2, len(places))
        size = std * whole[places] + part[places]
        return (sign * size)[(sign > 0) | (size > 0)]  # else 0 would come twice as often

    def _survivors(self, coin: Coin, places: Integers, times: Integers) -> Integers:
        """Return the places where exp(-coin) comes up as many times as is asked for there."""
        alive, tossed = np.isin(np.arange(len(times)), places), 0
        while len(due := places[alive[places] & (times[places] > tossed)]):
            alive[due] = self._exp_minus(coin, due)
            tossed += 1
        return places[alive[places]]

    def _exp_minus(self, coin: Coin, places: Integers) -> Truths:
        """Return, for each place, a coin that comes up with probability exp(-g).

        Args:
            coin: Comes up with probability g, at most 1.
            places: Where.
        """
        came_up, left, tosses = np.zeros(len(places), dtype=bool), np.arange(len(places)), 1
        while len(left):
            goes_on = coin(places[left]) & (self._below(tosses, len(left)) == 0)  # odds g / tosses
            came_up[left[~goes_on]] = tosses % 2 == 1
            left, tosses = left[goes_on], tosses + 1
        return came_up

    def _below(self, limit: int, count: int) -> Integers:
        """Return uniform integers from 0 to limit - 1, at most 2**62."""
        words = self._words(count)
        top = 2**64 - 2**64 % limit  # a multiple of the limit: what is beyond it is drawn again
        while top < 2**64 and len(beyond := np.flatnonzero(words >= np.uint64(top))):
            words[beyond] = self._words(len(beyond))
        return (words % np.uint64(limit)).astype(np.int64)

    def _words(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(bytearray(self._stream.update(bytes(8 * count))), dtype=np.uint64)

    def sample(self, num_rows: int, rate: float) -> list[int]:
        """Return a Poisson sample: each of `num_rows` indices with probability `rate`, alone."""
        if rate >= 1:
            return list(range(num_rows))
        return torch.nonzero(self.uniform(num_rows) < rate).flatten().tolist()  # type: ignore[no-any-return]


def add_noise(summed: Mapping[str, Tensor], std: float, noise: SecretNoise) -> Tensors:
    """Return `summed` plus independent normal noise of standard deviation `std` on each number."""
    return {
        name: tensor + noise.normal(tensor.shape, std).to(tensor.device)
        for name, tensor in summed.items()
    }
