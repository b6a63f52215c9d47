"""ALiBi, attention with linear biases: head count and positions to what is added to the scores.

    score[h, q, k] += slope[h] * (k - q)      (Press et al. 2022, https://arxiv.org/abs/2108.12409)

Shape suffixes: H = heads, Q = queries, K = keys with the cached ones, B = rows of the batch,
D = distances between a key and a query.
"""

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """Return one slope for each head, in float32: 2^(-8/n), 2^(-16/n), ... for n heads.

    Where the number of heads is no power of two, the largest power n below it gives the first n
    slopes, and the others are every second slope of the series for 2 n heads.
    """
    n = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * i / n for i in range(1, n + 1)]
    exponents += [4 * i / n for i in range(1, 2 * (num_heads - n), 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents])


def alibi_mask(open_BQK: Tensor, *, num_heads: int, num_cached: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, of shape `(B, H, Q, K)`.

    A pair that may not attend gets the lowest number of `dtype`. A query always sees itself, even
    in a row of padding: SDPA on the CPU computes wrong gradients for a row that sees nothing.

    Args:
        open_BQK: Which query may attend to which key, of shape `(B, 1, Q, K)`.
        num_heads: Number of heads.
        num_cached: Keys that come before the first query.
        dtype: Number format of the scores; the biases are computed in float32 and rounded once.
    """
    num_queries, num_keys = open_BQK.shape[-2:]
    queries = torch.arange(num_queries, device=open_BQK.device) + num_cached
    keys = torch.arange(num_keys, device=open_BQK.device)
    distance_QK = keys - queries[:, None]
    slopes_H = alibi_slopes(num_heads).to(open_BQK.device)
    distances_D = torch.arange(1 - num_keys, num_keys, device=open_BQK.device)
    # A bias depends on the distance alone, so each head's are computed once and looked up.
    bias_HD = (slopes_H[:, None] * distances_D).to(dtype)
    bias_HQK = bias_HD[:, distance_QK + num_keys - 1]
    return bias_HQK.where(open_BQK | (distance_QK == 0), torch.finfo(dtype).min)


def alibi_mask_bytes(num_heads: int, num_tokens: int, *, dtype: torch.dtype, rows: int = 1) -> int:
    """Return the memory of the mask, which every layer reads and which lives through the backward.

    Args:
        num_heads: Number of heads: 40 in the 13B models.
        num_tokens: Length of the padded rows.
        dtype: Number format of the activations.
        rows: Rows of a batch; 1 where the model gets no attention mask.
    """
    return rows * num_heads * num_tokens**2 * dtype.itemsize
