"""Gauges: the same D K A in other factors, so that factors of different sites mean the same.

For any invertible G, D K A = (D K G^-1) (G A), so the same update has many factors, and the mean of
factors depends on which. Both gauges take the core into D; the mean is then one of D and A alone.

Shape suffixes: I = inputs, O = outputs, R = rank.
"""

from collections.abc import Callable

from fedfora._torch import Tensor, torch
from fedfora.federated.aggregation.update import AdapterState, layers_of, product
from fedfora.lowrank import FRESH_ROW_NORM, best_factors
from fedfora.registry import Registry

Gauge = Callable[[AdapterState, AdapterState], AdapterState]
GAUGES: Registry[Gauge] = Registry("gauge")


@GAUGES.register("svd")
def svd(update: AdapterState, reference: AdapterState) -> AdapterState:
    """The canonical form: A with orthogonal rows, ordered by singular value, with fixed signs.

    It depends on the update alone; where singular values are close, those of two sites may come in
    another order, and their mean then mixes what does not belong together.

    Args:
        update: A site's adapter.
        reference: Not needed.
    """
    return _rewritten(
        update, lambda layer: best_factors(*product(update, layer), len(update[f"{layer}.A"]))
    )


@GAUGES.register("aligned")
def aligned(update: AdapterState, reference: AdapterState) -> AdapterState:
    """The canonical form, rotated towards a reference by the closest rotation.

    Orthogonal Procrustes (Schoenemann 1966): G = U V^T from the SVD of A_ref A^T + D_ref^T D.

    Args:
        update: A site's adapter.
        reference: The global adapter that all sites started from.
    """

    def factors(layer: str) -> tuple[Tensor, Tensor]:
        D_OR, A_RI = best_factors(*product(update, layer), len(update[f"{layer}.A"]))
        return rotate(D_OR, A_RI, *product(reference, layer))

    return _rewritten(update, factors)


def rotate(D_OR: Tensor, A_RI: Tensor, D_ref_OR: Tensor, A_ref_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return D G^T and G A, closest to the reference for orthogonal G; D A stays what it is.

    A counts in units of a fresh row's norm and D in those of the reference's columns, so that
    neither decides alone.
    """
    scale = (D_ref_OR.norm() / len(A_RI) ** 0.5).clamp(min=1e-12)
    near_RR = A_ref_RI @ A_RI.mT / FRESH_ROW_NORM**2 + D_ref_OR.mT @ D_OR / scale**2
    U_RR, _, Vh_RR = torch.linalg.svd(near_RR)
    G_RR = U_RR @ Vh_RR
    return D_OR @ G_RR.mT, G_RR @ A_RI


def _rewritten(
    update: AdapterState, factors: Callable[[str], tuple[Tensor, Tensor]]
) -> AdapterState:
    result: AdapterState = {}
    for layer in layers_of(update):
        D_OR, A_RI = factors(layer)
        result[f"{layer}.A"], result[f"{layer}.D"] = A_RI.float(), D_OR.float()
        result[f"{layer}.E"] = torch.zeros(len(A_RI), len(A_RI))
    return result
