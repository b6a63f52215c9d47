"""The means that rules take, of factors or of products D K A, and how far off one is.

The mean of A, D and K - I is not the mean of D K A, unless all factors but one are the same at all
sites: in `ffa` (what travels is the product D K, next to a frozen A) and in `core`.

The mean of K products is a product of stacked factors, P Q with P = [w_1 D_1 K_1, ...] (O, S) and
Q = [A_1; ...] (S, I). No O x I matrix is formed, and sites may have different ranks.

Shape suffixes: K = sites, I = inputs, O = outputs, R = rank, S = ranks of all terms added up,
N = all numbers that travel, or all coefficients of an update.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfora.federated.aggregation.robust import Combine
from fedfora.federated.aggregation.update import (
    AdapterState,
    Product,
    Weighted,
    checked,
    layers_of,
    product,
    rank_of,
)

FRESH_ROW_NORM = 3**-0.5  # expected norm of a row of a fresh A (kaiming uniform, a = sqrt(5))


def mean_of_factors(
    current: AdapterState, updates: Iterable[Weighted], combine: Combine | None = None
) -> AdapterState:
    """Mean of each factor (McMahan et al. 2017, https://arxiv.org/abs/1602.05629, Alg. 1).

    The updates are read one by one and added up, so one adapter is in memory however many sites
    there are; a robust `combine` needs them all, as differences from the global adapter.

    Args:
        current: The global adapter's factors that travel.
        updates: Pairs of update and weight, e.g. the tokens trained on; weights are positive.
        combine: What to do instead of the mean.

    Raises:
        ValueError: If there is no update, or a weight is not positive.
    """
    if combine is not None:
        return _combined_factors(current, list(checked(updates)), combine)
    total = 0.0
    sums: dict[str, Tensor] = {}
    for update, weight in checked(updates):
        total += weight
        for name, value in update.items():
            term = weight * value.double()
            sums[name] = sums[name] + term if name in sums else term
    return {name: (value / total).float() for name, value in sums.items()}


def _combined_factors(
    current: AdapterState, pairs: list[Weighted], combine: Combine
) -> AdapterState:
    before_N = _flat(current, current)
    deltas_KN = torch.stack([_flat(update, current) - before_N for update, _ in pairs])
    after_N = before_N + combine(deltas_KN)
    pieces = torch.split(after_N, [value.numel() for value in current.values()])
    return {
        name: piece.reshape(value.shape).float()
        for (name, value), piece in zip(current.items(), pieces, strict=True)
    }


def _flat(update: AdapterState, order: AdapterState) -> Tensor:
    return torch.cat([update[name].double().flatten() for name in order])


class ProductSum:
    """A weighted sum of products in factored form, in memory that does not grow without bound."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []

    def add(self, factors: Product, weight: float = 1.0) -> None:
        """Add `weight` times a product of (O, R) and (R, I)."""
        P_OR, Q_RI = factors
        self.left.append(weight * P_OR)
        self.right.append(Q_RI)
        if sum(len(Q) for Q in self.right) > 2 * min(len(P_OR), Q_RI.shape[1]):
            P_OS, Q_SI = self._lossless(*self.factors())
            self.left, self.right = [P_OS], [Q_SI]

    def factors(self) -> Product:
        """Return the sum as P (O, S) and Q (S, I)."""
        return torch.cat(self.left, dim=1), torch.cat(self.right, dim=0)

    @staticmethod
    def _lossless(P_OS: Tensor, Q_SI: Tensor) -> Product:
        """Return the same product with S = min(I, O)."""
        if len(P_OS) <= Q_SI.shape[1]:
            V_OO, T_OS = torch.linalg.qr(P_OS)
            return V_OO, T_OS @ Q_SI
        V_II, T_IS = torch.linalg.qr(Q_SI.mT)
        return P_OS @ T_IS.mT, V_II.mT


class ProductMeans:
    """Weighted means of the layers' products, over updates that arrive one by one."""

    def __init__(self) -> None:
        self.sums: dict[str, ProductSum] = {}
        self._total = 0.0

    def add(self, update: AdapterState, weight: float) -> None:
        """Add a whole adapter."""
        self._total += weight
        for layer in layers_of(update):
            self.sums.setdefault(layer, ProductSum()).add(product(update, layer), weight)

    def factors(self) -> dict[str, Product]:
        """Return the means in factored form, by layer."""
        means = {}
        for layer, accumulated in self.sums.items():
            P_OS, Q_SI = accumulated.factors()
            means[layer] = (P_OS / self._total, Q_SI)
        return means


def squared_norm(factors: Product) -> float:
    """Return ||P Q||_F^2 from the Gram matrices of the factors, trace((P^T P) (Q Q^T))."""
    P_OS, Q_SI = factors
    return float(((P_OS.mT @ P_OS) * (Q_SI @ Q_SI.mT)).sum())


def refactor(
    current: AdapterState, updates: Iterable[Weighted], combine: Combine | None = None
) -> AdapterState:
    """The mean of D K A, reduced to the global adapter's rank by the closest factors.

    Arguments as for `mean_of_factors`; ranks may differ.

    Raises:
        ValueError: If there is no update, or a weight is not positive.
    """
    rank = rank_of(current)
    pairs = checked(updates)
    if combine is None:
        means = ProductMeans()
        for update, weight in pairs:
            means.add(update, weight)
        combined = means.factors()
    else:
        combined = _combined_products(current, list(pairs), combine)
    result: AdapterState = {}
    for layer, (P_OS, Q_SI) in combined.items():
        D_OR, A_RI = best_factors(P_OS, Q_SI, rank)
        result[f"{layer}.A"], result[f"{layer}.D"] = A_RI.float(), D_OR.float()
    return result


def _combined_products(
    current: AdapterState, pairs: list[Weighted], combine: Combine
) -> dict[str, Product]:
    """Combine the changes of products as rows of coefficients in orthonormal bases.

    A layer's products all lie in U M V^T, with U and V the principal axes of the changes: distances
    and norms of the S x S coefficients are those of the full matrices, and neither the order of the
    sites nor the factors in which an update came matters.
    """
    bases, before, rows = {}, {}, []
    for layer in layers_of(pairs[0][0]):
        P0_OR, Q0_RI = product(current, layer)
        products = [product(update, layer) for update, _ in pairs]
        lefts, rights = zip(*products, (P0_OR, Q0_RI), strict=True)  # U and V span all of them
        U_OS, _ = torch.linalg.qr(torch.cat(lefts, dim=1))
        V_IS, _ = torch.linalg.qr(torch.cat(rights, dim=0).mT)
        M0_SS = (U_OS.mT @ P0_OR) @ (Q0_RI @ V_IS)
        changes_KSS = torch.stack([(U_OS.mT @ P) @ (Q @ V_IS) for P, Q in products]) - M0_SS
        left_SS = torch.linalg.eigh((changes_KSS @ changes_KSS.mT).sum(dim=0)).eigenvectors
        right_SS = torch.linalg.eigh((changes_KSS.mT @ changes_KSS).sum(dim=0)).eigenvectors
        bases[layer] = (U_OS @ left_SS, V_IS @ right_SS)
        before[layer] = left_SS.mT @ M0_SS @ right_SS
        rows.append((left_SS.mT @ changes_KSS @ right_SS).flatten(1))
    combined_N = combine(torch.cat(rows, dim=1))
    pieces = torch.split(combined_N, [row.shape[1] for row in rows])
    result = {}
    for (layer, (U_OS, V_IS)), piece in zip(bases.items(), pieces, strict=True):
        M_SS = before[layer] + piece.reshape(U_OS.shape[1], V_IS.shape[1])
        result[layer] = (U_OS @ M_SS, V_IS.mT)
    return result


def best_factors(P_OS: Tensor, Q_SI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return D (O, R) and A (R, I) whose product is the closest to P Q in Frobenius norm.

    QR of both factors and an SVD of the small S x S product (Eckart and Young 1936), in
    O((I + O) S^2). Any split of the singular values between D and A gives the same product. Here A
    gets orthogonal rows of the norm that a fresh A has, and D the rest: training then continues as
    from a fresh adapter, where a balanced split would start from a tiny A and learn slowly. Signs
    are fixed by the largest entry of each row of A, so equal products give equal factors.

    Args:
        P_OS: Left factor.
        Q_SI: Right factor.
        rank: R; if the product's rank is lower, the rest is filled with zeros.
    """
    left_OS, R1_SS = torch.linalg.qr(P_OS)
    right_IS, R2_SS = torch.linalg.qr(Q_SI.mT)
    U_SS, sigma_S, Vh_SS = torch.linalg.svd(R1_SS @ R2_SS.mT, full_matrices=False)
    kept = min(rank, len(sigma_S))
    D_OR = left_OS @ (U_SS[:, :kept] * sigma_S[:kept])
    A_RI = Vh_SS[:kept] @ right_IS.mT
    largest_R1 = A_RI.gather(1, A_RI.abs().argmax(dim=1, keepdim=True))
    sign_R1 = torch.where(largest_R1 < 0, -1.0, 1.0)
    D_OR, A_RI = D_OR * sign_R1.mT / FRESH_ROW_NORM, A_RI * sign_R1 * FRESH_ROW_NORM
    missing = rank - kept
    if missing:
        D_OR = torch.cat([D_OR, D_OR.new_zeros(len(D_OR), missing)], dim=1)
        A_RI = torch.cat([A_RI, A_RI.new_zeros(missing, A_RI.shape[1])], dim=0)
    return D_OR, A_RI


# The error meter: how far an aggregate is from the mean of the updates it stands for.
#
#     error = ||D K A - mean_k(D_k K_k A_k)||_F / ||mean_k(D_k K_k A_k)||_F        over all layers
#
# Differences and norms go through stacked factors and their Gram matrices; no O x I matrix is
# formed. Squares are subtracted, so errors below about 1e-7 are rounding.


@dataclass(frozen=True)
class Reading:
    """What the meter shows, under the names of a round's record.

    Args:
        aggregation_error: Of the aggregate, relative to the norm of the mean update; 0 where both
            are zero.
        aggregation_error_of_step: The same difference relative to what the mean changed in this
            round.
        attainable_error: The error of the closest adapter of the same rank: `refactor`'s.
    """

    aggregation_error: float
    aggregation_error_of_step: float
    attainable_error: float


class ErrorMeter(ProductMeans):
    """Sees every update of a round (`add`), and then the aggregate."""

    def read(self, aggregate: AdapterState, before: AdapterState) -> Reading:
        """Compare an aggregate, the new global adapter, with the mean of what was seen."""
        missed = step = norm = cut = 0.0
        for layer, mean in self.factors().items():
            missed += _squared_distance(product(aggregate, layer), mean)
            step += _squared_distance(product(before, layer), mean)
            norm += squared_norm(mean)
            closest = best_factors(*mean, len(aggregate[f"{layer}.A"]))
            cut += _squared_distance(closest, mean)
        return Reading(_root(missed, norm), _root(missed, step), _root(cut, norm))


def _squared_distance(one: Product, other: Product) -> float:
    left = torch.cat([one[0], -other[0]], dim=1)
    right = torch.cat([one[1], other[1]], dim=0)
    return max(0.0, squared_norm((left, right)))


def _root(numerator: float, denominator: float) -> float:
    return (numerator / denominator) ** 0.5 if denominator > 0 else 0.0
