"""Bounded influence: gradients of examples and updates of sites, cut to a norm.

After clipping to C no example (no site) moves a sum by more than C in L2 norm. Normal noise of
standard deviation z C on each number of the sum is then the Gaussian mechanism with noise
multiplier z (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, Alg. 1).

Shape suffixes: B examples, `...` the shape of a parameter.
"""

import math
from collections.abc import Mapping

from fedfora._torch import Tensor, torch
from fedfora.privacy.noise import SecretNoise

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


def add_noise(summed: Mapping[str, Tensor], std: float, noise: SecretNoise) -> Tensors:
    """Return `summed` plus independent normal noise of standard deviation `std` on each number."""
    return {
        name: tensor + noise.normal(tensor.shape, std).to(tensor.device)
        for name, tensor in summed.items()
    }


def noise_share_std(noise_multiplier: float, clipping_norm: float, num_sites: int) -> float:
    """Return the noise each site adds so that any `num_sites` of them together hide one site.

    For sums that only a group sees (secure aggregation): the sum of n shares of standard deviation
    z C / sqrt(n) has z C. Give the smallest number of sites whose sum is ever opened, the
    threshold: more sites then only add noise.

    Args:
        noise_multiplier: z.
        clipping_norm: C.
        num_sites: The least number of honest sites whose shares are in every opened sum.
    """
    if num_sites < 1:
        raise ValueError(f"noise needs at least one site, got {num_sites}")
    return noise_multiplier * clipping_norm / math.sqrt(num_sites)
