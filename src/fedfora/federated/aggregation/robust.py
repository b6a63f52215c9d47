"""Robust combinations: what to use instead of the mean if some sites may send anything.

Each maps the sites' changes, as rows (K, N), to one change (N,). It works on any rule, as rules
hand over rows whose distances are those of what they average. Every site counts the same: a weight
is only what a site claims.

Shape suffixes: K = sites, N = numbers of a change; f = sites that may be malicious.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedfora.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Combine = Callable[["Tensor"], "Tensor"]  # rows to one row

logger = logging.getLogger(__name__)

ROBUST: Registry[Callable[[Tensor, int], Tensor]] = Registry("robust combination")


def robust(name: str, num_malicious: int) -> Combine | None:
    """Return a combination that withstands `num_malicious` sites; None for "none".

    Raises:
        ValueError: If no rule has that name.
    """
    if name == "none":
        return None
    combine = ROBUST[name]
    return lambda rows_KN: combine(rows_KN, num_malicious)


@ROBUST.register("median")
def median(rows_KN: Tensor, f: int) -> Tensor:
    """Median of each coordinate (Yin et al. 2018, https://arxiv.org/abs/1803.01498, Def. 1).

    With an even number of sites, the mean of the middle two. Bounded by the honest sites' values as
    long as fewer than half of the sites are malicious, whatever `f` says.
    """
    sorted_KN = rows_KN.sort(dim=0).values
    K = len(rows_KN)
    return (sorted_KN[(K - 1) // 2] + sorted_KN[K // 2]) / 2


@ROBUST.register("trimmed-mean")
def trimmed_mean(rows_KN: Tensor, f: int) -> Tensor:
    """Mean of each coordinate without its `f` largest and smallest (Yin et al. 2018, Def. 2).

    Bounded by the honest sites' values with up to f < K / 2 malicious ones; with fewer replies than
    that needs, as many are cut off as leave one or two.
    """
    K = len(rows_KN)
    cut = min(f, (K - 1) // 2)
    if cut < f:
        logger.warning("too few replies, %d, to trim %d at each end; trimmed %d", K, f, cut)
    return rows_KN.sort(dim=0).values[cut : K - cut].mean(dim=0)


@ROBUST.register("multi-krum")
def multi_krum(rows_KN: Tensor, f: int) -> Tensor:
    """Mean of the K - f changes closest to their neighbors (Blanchard et al. 2017, NeurIPS 30).

    A site's score is the sum of its squared distances to its K - f - 2 nearest.
    """
    K = len(rows_KN)
    if 2 * f + 3 > K:
        logger.warning("too few sites, %d, for Krum to withstand %d malicious ones", K, f)
    gram_KK = rows_KN @ rows_KN.mT
    squares_K = gram_KK.diagonal()
    distances_KK = (squares_K[:, None] + squares_K[None, :] - 2 * gram_KK).clamp(min=0)
    nearest_KK = distances_KK.sort(dim=1).values
    scores_K = nearest_KK[:, 1 : max(2, K - f - 1)].sum(dim=1)  # without itself
    chosen = scores_K.argsort(stable=True)[: max(1, K - f)]
    return rows_KN[chosen.sort().values].mean(dim=0)
