"""The rule that averages what the adapters do, D K A, through stacked factors: `refactor`.

The mean of K products is a product of stacked factors, P Q with P = [w_1 D_1 K_1, ...] (O, S) and
Q = [A_1; ...] (S, I). No O x I matrix is formed, and sites may have different ranks.

Shape suffixes: K = sites, I = inputs, O = outputs, R = rank, S = ranks of all terms added up,
N = all coefficients of an update.
"""

from collections.abc import Iterable

from fedfora._torch import Tensor, torch
from fedfora.federated.aggregation.rule import RULES, Combine, Rule, checked
from fedfora.federated.aggregation.update import (
    AdapterState,
    Product,
    Weighted,
    layers_of,
    product,
    rank_of,
)
from fedfora.lowrank import best_factors


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
    """Weighted means of the layers' products, of updates that come one by one."""

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
    """The mean of D K A, brought to the rank of the global adapter by the closest factors.

    Args:
        current: The global adapter.
        updates: Pairs of update and weight as for `mean_of_factors`; ranks may differ.
        combine: What to do instead of the mean.

    Raises:
        ValueError: If there is no update, or a weight is not positive.
    """
    rank = rank_of(current)
    pairs = checked(updates)
    combined = _mean(pairs) if combine is None else _combined(current, list(pairs), combine)
    result: AdapterState = {}
    for layer, (P_OS, Q_SI) in combined.items():
        D_OR, A_RI = best_factors(P_OS, Q_SI, rank)
        result[f"{layer}.A"], result[f"{layer}.D"] = A_RI.float(), D_OR.float()
    return result


def _mean(updates: Iterable[Weighted]) -> dict[str, Product]:
    means = ProductMeans()
    for update, weight in updates:
        means.add(update, weight)
    return means.factors()


def _combined(current: AdapterState, pairs: list[Weighted], combine: Combine) -> dict[str, Product]:
    """Combine the changes of products as rows of coefficients in orthonormal bases.

    A layer's products all lie in U M V^T, with U and V the principal axes of the changes: distances
    and norms of the S x S coefficients are those of the full matrices, and neither the order of the
    sites nor the factors in which an update came plays a part.
    """
    weights_K = torch.tensor([weight for _, weight in pairs], dtype=torch.float64)
    bases, before, rows = {}, {}, []
    for layer in layers_of(pairs[0][0]):
        P0_OR, Q0_RI = product(current, layer)
        products = [product(update, layer) for update, _ in pairs]
        U_OS, V_IS = _spanning_bases([*products, (P0_OR, Q0_RI)])
        M0_SS = (U_OS.mT @ P0_OR) @ (Q0_RI @ V_IS)
        changes_KSS = torch.stack([(U_OS.mT @ P) @ (Q @ V_IS) for P, Q in products]) - M0_SS
        left_SS, right_SS = _principal_axes(changes_KSS)
        bases[layer] = (U_OS @ left_SS, V_IS @ right_SS)
        before[layer] = left_SS.mT @ M0_SS @ right_SS
        rows.append((left_SS.mT @ changes_KSS @ right_SS).flatten(1))
    combined_N = combine(torch.cat(rows, dim=1), weights_K)
    pieces = torch.split(combined_N, [row.shape[1] for row in rows])
    result = {}
    for (layer, (U_OS, V_IS)), piece in zip(bases.items(), pieces, strict=True):
        M_SS = before[layer] + piece.reshape(U_OS.shape[1], V_IS.shape[1])
        result[layer] = (U_OS @ M_SS, V_IS.mT)
    return result


def _spanning_bases(products: list[Product]) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns U (O, S) and V (I, S') that span all of some products."""
    U_OS, _ = torch.linalg.qr(torch.cat([P_OR for P_OR, _ in products], dim=1))
    V_IS, _ = torch.linalg.qr(torch.cat([Q_RI for _, Q_RI in products], dim=0).mT)
    return U_OS, V_IS


def _principal_axes(changes_KSS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of sum_k M_k M_k^T and of sum_k M_k^T M_k."""
    left_SS = torch.linalg.eigh((changes_KSS @ changes_KSS.mT).sum(dim=0)).eigenvectors
    right_SS = torch.linalg.eigh((changes_KSS.mT @ changes_KSS).sum(dim=0)).eigenvectors
    return left_SS, right_SS


RULES.add(
    "refactor",
    Rule(
        "refactor",
        refactor,
        travels="AD",
        absorbs=True,
        any_rank=True,
        keeps_coordinates=False,
    ),
)
