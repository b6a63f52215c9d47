"""Robust combinations: what a minority of malicious sites can do, and hand values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.federated.aggregation import ROBUST, RULES
from fedfora.federated.aggregation.robust import robust

SITES = st.integers(0, 2**31 - 1)


def honest_rows(seed, num_honest=5, width=6):
    return torch.randn(num_honest, width, generator=torch.Generator().manual_seed(seed)).double()


def combine(name, rows, f=1):
    return robust(name, f)(rows)


@pytest.mark.parametrize("name", list(ROBUST))
@settings(deadline=None, max_examples=50)
@given(seed=SITES, lie=st.floats(-1e12, 1e12))
def test_one_liar_among_six_cannot_leave_the_range_of_the_honest(name, seed, lie):
    """Coordinates stay between the honest sites' smallest and largest, whatever the liar says."""
    honest = honest_rows(seed)
    rows = torch.cat([honest, torch.full((1, 6), lie, dtype=torch.float64)])
    result = combine(name, rows)
    low, high = honest.amin(dim=0), honest.amax(dim=0)
    if name == "multi-krum":  # it may take a liar who stays close; how far off is bounded too
        spread = (honest - honest.mean(dim=0)).norm(dim=1).max()
        assert (result - honest.mean(dim=0)).norm() <= 3 * spread
    else:
        assert (result >= low - 1e-9).all()
        assert (result <= high + 1e-9).all()


def test_the_mean_has_no_such_bound(adapters):
    honest = [(adapters.random(k), 1.0) for k in range(5)]
    liar = {name: 1e6 * value for name, value in adapters.random(9).items()}
    mean = RULES["fedavg"].aggregate(adapters.random(0), [*honest, (liar, 1.0)], None)
    assert mean["q.A"].norm() > 1e4


@pytest.mark.parametrize("name", list(ROBUST))
@pytest.mark.parametrize("rule", ["fedavg", "refactor", "core", "ffa"])
def test_any_rule_stands_a_liar_with_a_robust_combination(rule, name, adapters):
    """An update a million times too long moves the result by no more than honest ones differ."""
    rules, factors = RULES[rule], "E" if rule == "core" else "AD"
    before = {n: torch.zeros_like(v) for n, v in adapters.random(0).items()}
    before = {n: v for n, v in before.items() if n[-1] in RULES[rule].travels}
    honest = [
        {n: v for n, v in adapters.random(k).items() if n[-1] in rules.travels} for k in range(1, 6)
    ]
    liar = {n: 1e6 * v for n, v in honest[0].items()}
    pairs = [(update, 1.0) for update in [*honest, liar]]
    if rule in ("core", "ffa"):
        result = rules.aggregate(before, pairs, robust(name, 1))
        assert max(v.abs().max() for v in result.values()) < 10
        return
    result = rules.aggregate(before, pairs, robust(name, 1))
    longest = max(adapters.dense(update).norm() for update in honest)
    assert adapters.dense(result).norm() < 6 * longest, factors


def test_median_and_trimmed_mean_by_hand():
    rows = torch.tensor([[1.0, 9.0], [2.0, 7.0], [4.0, 8.0], [100.0, -50.0]]).double()
    assert combine("median", rows).tolist() == [3.0, 7.5]  # means of the middle two
    assert combine("trimmed-mean", rows).tolist() == [3.0, 7.5]  # one cut at each end
    assert combine("trimmed-mean", rows, f=0).tolist() == [26.75, -6.5]


def test_krum_by_hand():
    """Sites at 0, 1, 2.5 and 50, f = 1: the three with the nearest neighbors are averaged."""
    rows = torch.tensor([[0.0], [1.0], [2.5], [50.0]]).double()
    assert combine("multi-krum", rows).tolist() == [3.5 / 3]


def test_too_few_replies_to_trim_are_said(caplog):
    rows = torch.tensor([[1.0], [3.0]]).double()
    assert combine("trimmed-mean", rows).tolist() == [2.0]
    assert "too few replies, 2, to trim" in caplog.text


@pytest.mark.parametrize("name", list(ROBUST))
def test_scaling_all_changes_scales_the_result(name):
    rows = honest_rows(3)
    torch.testing.assert_close(combine(name, 7 * rows), 7 * combine(name, rows))
