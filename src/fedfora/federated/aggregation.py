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

from fedfora._lowrank import best_factors
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
    Q = [A_1; ...] (S, I); `best_factors` never forms the O x I matrix. Ranks may differ between
    sites; the result has the largest.

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
        D_OR, A_RI = best_factors(P_OS, Q_SI, rank)
        result[f"{layer}.A"], result[f"{layer}.D"] = A_RI.float(), D_OR.float()
        result[f"{layer}.E"] = torch.zeros(rank, rank)
    return result


def _outer_factors(update: Update, layer: str) -> tuple[Tensor, Tensor]:
    """Return D K (O, R) and A (R, I) of a layer."""
    A_RI, D_OR, E_RR = (update[f"{layer}.{factor}"].double() for factor in ("A", "D", "E"))
    return D_OR + D_OR @ E_RR, A_RI


def _check_weight(weight: float) -> None:
    if not 0 < weight < float("inf"):
        raise ValueError(f"a site's weight must be positive and finite, got {weight}")
