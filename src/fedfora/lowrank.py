"""Products of low rank, handled through their factors: best approximation, norms, no large matrix.

Shape suffixes: O x S and S x I are a product's factors, R is the rank asked for.
"""

from fedfora._torch import Tensor, torch

FRESH_ROW_NORM = 3**-0.5  # expected norm of a row of a fresh A (kaiming uniform, a = sqrt(5))


def best_factors(P_OS: Tensor, Q_SI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return D (O, R) and A (R, I) whose product is the closest to P Q in Frobenius norm.

    QR of both factors and an SVD of the small S x S product (Eckart and Young 1936), in
    O((I + O) S^2). Any split of the singular values between D and A gives the same product. Here A
    gets orthogonal rows of the norm that a fresh A has, and D the rest: training then goes on as
    from a fresh adapter, where a balanced split would start from a tiny A and learn slowly. Signs
    are fixed by the largest entry of each row of A, so equal products give equal factors.

    Args:
        P_OS: Left factor.
        Q_SI: Right factor.
        rank: R; where the product has no such rank, the rest is filled with zeros.
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
