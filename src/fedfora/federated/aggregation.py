"""Aggregation rules: from the sites' folded adapters to one global adapter.

A rule is a pure function of an iterable of weighted updates. It reads them one by one, so a rule
that only needs sums holds one adapter in memory however many sites there are. It knows nothing of
Flower, of models or of rounds. Arithmetic is in float64, whatever travels; results are float32.

An update maps `<layer>.<factor>` to a tensor, with the factors A (R, I), D (O, R) and E = K - I
(R, R) of a folded adapter: the update of a layer is D K A.

Shape suffixes: K = sites, I = inputs, O = outputs, R = rank, S = ranks of all sites added up.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fedfora._registry import Registry

Update = dict[str, Tensor]
Weighted = tuple[Update, float]
Rule = Callable[[Iterable[Weighted]], Update]

RULES: Registry[Rule] = Registry("aggregation rule")


@RULES.register("fedavg")
def fedavg(updates: Iterable[Weighted]) -> Update:
    """Mean of each factor (McMahan et al. 2017, https://arxiv.org/abs/1602.05629, Alg. 1).

    The mean of A, D and K - I is not the mean of D K A; it is exact only where two of the three
    are the same at all sites.

    Args:
        updates: Pairs of update and weight, e.g. the tokens trained on; weights are positive.

    Raises:
        ValueError: If there is no update, or a weight is not positive.
    """
    total = 0.0
    sums: dict[str, Tensor] = {}
    for update, weight in updates:
        _check_weight(weight)
        total += weight
        for name, value in update.items():
            term = weight * value.double()
            sums[name] = sums[name] + term if name in sums else term
    if not sums:
        raise ValueError("nothing to aggregate: no site sent an update")
    return {name: (value / total).float() for name, value in sums.items()}


@RULES.register("refactor")
def refactor(updates: Iterable[Weighted]) -> Update:
    """The exact mean of D K A, brought back to rank R by the closest factors.

    The mean is a product of stacked factors, P Q with P = [w_1 D_1 K_1, ...] (O, S) and
    Q = [A_1; ...] (S, I). QR of both and an SVD of the small product give the best rank-R
    approximation in Frobenius norm (Eckart and Young 1936) in O((I + O) S^2), without a matrix of
    O x I. Ranks may differ between sites; the result has the largest.

    Args:
        updates: Pairs of update and weight as for `fedavg`.

    Raises:
        ValueError: If there is no update, or a weight is not positive.
    """
    pairs = list(updates)
    if not pairs:
        raise ValueError("nothing to aggregate: no site sent an update")
    for _, weight in pairs:
        _check_weight(weight)
    total = sum(weight for _, weight in pairs)
    shares = [weight / total for _, weight in pairs]
    result: Update = {}
    for layer in [name.removesuffix(".A") for name in pairs[0][0] if name.endswith(".A")]:
        factors = [_outer_factors(update, layer) for update, _ in pairs]
        P_OS = torch.cat([w * DK_OR for w, (DK_OR, _) in zip(shares, factors, strict=True)], dim=1)
        Q_SI = torch.cat([A_RI for _, A_RI in factors], dim=0)
        rank = max(A_RI.shape[0] for _, A_RI in factors)
        D_OR, A_RI = _best_factors(P_OS, Q_SI, rank)
        result[f"{layer}.A"], result[f"{layer}.D"] = A_RI.float(), D_OR.float()
        result[f"{layer}.E"] = torch.zeros(rank, rank)
    return result


def _outer_factors(update: Update, layer: str) -> tuple[Tensor, Tensor]:
    """Return D K (O, R) and A (R, I) of a layer."""
    A_RI, D_OR, E_RR = (update[f"{layer}.{factor}"].double() for factor in ("A", "D", "E"))
    return D_OR + D_OR @ E_RR, A_RI


def _best_factors(P_OS: Tensor, Q_SI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return D (O, R) and A (R, I) whose product is closest to P Q.

    Any split of the singular values between D and A gives the same product. Here A gets orthogonal
    rows of the norm that a fresh A has, 1/sqrt(3), and D the rest: the next round then trains as
    from a fresh adapter, where a balanced split would start from a tiny A and learn slowly. Signs
    are fixed by the largest entry of each row, so equal inputs give equal factors.
    """
    left_OS, R1_SS = torch.linalg.qr(P_OS)
    right_IS, R2_SS = torch.linalg.qr(Q_SI.mT)
    U_SS, sigma_S, Vh_SS = torch.linalg.svd(R1_SS @ R2_SS.mT)
    D_OR = left_OS @ (U_SS[:, :rank] * sigma_S[:rank])
    A_RI = Vh_SS[:rank] @ right_IS.mT
    largest_R1 = A_RI.gather(1, A_RI.abs().argmax(dim=1, keepdim=True))
    sign_R1 = torch.where(largest_R1 < 0, -1.0, 1.0)
    norm = 3**-0.5
    return D_OR * sign_R1.mT / norm, A_RI * sign_R1 * norm


def _check_weight(weight: float) -> None:
    if not 0 < weight < float("inf"):
        raise ValueError(f"a site's weight must be positive and finite, got {weight}")
