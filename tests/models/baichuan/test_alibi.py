"""ALiBi against a slow reading of the paper."""

import pytest
import torch

from fedfora.models.baichuan.modeling import alibi_mask, alibi_slopes


def slow_mask(open_BQK, slopes, num_cached, dtype):
    """One pair of query and key at a time."""
    rows, _, queries, keys = open_BQK.shape
    mask = torch.empty(rows, len(slopes), queries, keys, dtype=dtype)
    for b in range(rows):
        for h, slope in enumerate(slopes):
            for q in range(queries):
                for k in range(keys):
                    may_see = open_BQK[b, 0, q, k] or k == q + num_cached
                    bias = slope * (k - (q + num_cached))
                    mask[b, h, q, k] = bias if may_see else torch.finfo(dtype).min
    return mask


def test_slopes_of_a_power_of_two_are_a_geometric_series():
    expected = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(8).tolist() == expected


def test_slopes_of_other_counts_take_every_second_of_the_series_twice_as_long():
    assert torch.equal(alibi_slopes(6), torch.cat([alibi_slopes(4), alibi_slopes(8)[[0, 2]]]))
    assert torch.equal(alibi_slopes(40), torch.cat([alibi_slopes(32), alibi_slopes(64)[:16:2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "num_cached"), [(5, 0), (2, 3), (1, 4)])
def test_the_mask_is_the_slow_one(dtype, queries, num_cached):
    generator = torch.Generator().manual_seed(1)
    open_BQK = torch.rand(2, 1, queries, 5, generator=generator) < 0.6
    mask = alibi_mask(open_BQK, num_heads=6, num_cached=num_cached, dtype=dtype)
    assert torch.equal(mask, slow_mask(open_BQK, alibi_slopes(6).tolist(), num_cached, dtype))


def test_a_row_that_may_see_nothing_sees_itself():
    closed = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask = alibi_mask(closed, num_heads=1, num_cached=0, dtype=torch.float32)
    assert torch.equal(mask[0, 0] == 0, torch.eye(3, dtype=torch.bool))
