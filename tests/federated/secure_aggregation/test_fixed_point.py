"""Fixed point: sums are exact, the error is bounded and stated, clipping is counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfora.federated.secure_aggregation.fixed_point import FixedPoint

sites = st.lists(
    st.tuples(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4), st.integers(1, 10_000)),
    min_size=1,
    max_size=6,
)


@given(sites)
def test_the_decoded_mean_is_the_weighted_mean_within_the_stated_error(pairs):
    code = FixedPoint(1.0, num_sites=len(pairs), max_weight=10_000)
    total = np.zeros(4, np.uint32)
    for values, weight in pairs:
        total += code.encode(np.array(values, np.float32), weight)[0]
    weights = np.array([w for _, w in pairs], np.float64)
    exact = np.array([v for v, _ in pairs], np.float64).T @ weights / weights.sum()
    error = np.abs(code.decode(total, int(weights.sum())) - exact).max()
    assert error <= code.max_error(int(weights.sum())) * (1 + 1e-6) + 1e-15


@pytest.mark.parametrize("num_sites", [3, 50, 500, 10_000])
def test_the_largest_sum_does_not_wrap_around(num_sites):
    code = FixedPoint(0.5, num_sites, max_weight=1)
    for extreme in (0.5, -0.5):
        (word,), _ = code.encode(np.array([extreme]), 1)
        total = np.array([int(word) * num_sites % 2**32], np.uint32)
        assert code.decode(total, num_sites)[0] == pytest.approx(extreme, rel=1e-12)


@pytest.mark.parametrize("num_sites", [5, 50, 500])
def test_the_stated_error_is_a_hundred_thousandth_of_the_range_where_weights_are_like(num_sites):
    code = FixedPoint(2.0, num_sites, max_weight=4_000)
    assert code.max_error(num_sites * 1_000) <= 1e-5 * 2.0


def test_clipped_numbers_are_counted():
    code = FixedPoint(1.0, 2, 1)
    words, clipped = code.encode(np.array([0.5, 1.5, -2.0, 1.0]), 1)
    assert clipped == 2
    assert code.decode(words, 1) == pytest.approx([0.5, 1.0, -1.0, 1.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        FixedPoint(1.0, 2, 1).encode(np.array([0.0, bad]), 1)


@pytest.mark.parametrize("weight", [0, -1, 11])
def test_a_weight_out_of_its_bounds_is_refused(weight):
    with pytest.raises(ValueError, match="between 1 and 10"):
        FixedPoint(1.0, 2, 10).encode(np.zeros(1), weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 2, 1), "--secagg_range"),
        ((np.inf, 2, 1), "--secagg_range"),
        ((np.nan, 2, 1), "--secagg_range"),
        ((1.0, 0, 1), "at least 1"),
        ((1.0, 2, 0), "at least 1"),
        ((1.0, 2**16, 2**16), "do not fit into 32 bits"),
    ],
)
def test_what_cannot_be_added_up_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FixedPoint(*arguments)


def test_counts_too_large_for_the_sum_saturate():
    code = FixedPoint(1.0, 1000, 1)
    assert code.encode_counts([7, -1, 2**32]).tolist() == [7, 0, (2**32 - 1) // 1000]
