"""Contributions: the sum says what the sites said together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfora.federated.secure_aggregation.fixed_point import (
    MAX_LOSS,
    FixedPoint,
    contribution,
    read_sum,
    vector_size,
)

parts = st.lists(
    st.tuples(
        st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3),
        st.integers(1, 5000),
        st.floats(0, MAX_LOSS),
    ),
    min_size=1,
    max_size=5,
)


@given(parts)
def test_the_sum_gives_the_weighted_means_and_the_weight(sites):
    code = FixedPoint(1.0, len(sites), 5000)
    total = np.zeros(vector_size(3), np.uint32)
    for update, weight, loss in sites:
        total += contribution(
            np.array(update), weight=weight, loss=loss, code=code, max_norm=float("inf")
        )
    summed = read_sum(total, code)
    weights = np.array([weight for _, weight, _ in sites])
    exact = np.array([update for update, _, _ in sites]).T @ weights / weights.sum()
    error = code.max_error(int(weights.sum())) + 1e-12
    assert summed.weight == weights.sum()
    assert np.abs(summed.mean_N - exact).max() <= error
    loss = sum(w * loss for _, w, loss in sites) / weights.sum()
    assert abs(summed.loss - loss) <= error * MAX_LOSS
    assert (summed.clipped, summed.shortened) == (0, 0)


def test_long_updates_are_shortened_out_of_range_ones_clipped_and_both_counted():
    code = FixedPoint(1.0, 2, 10)
    update = np.array([3.0, 4.0])
    shortened = contribution(update, weight=1, loss=0.0, code=code, max_norm=0.5)
    clipped = contribution(update, weight=1, loss=0.0, code=code, max_norm=np.inf)
    assert read_sum(shortened, code).mean_N == pytest.approx([0.3, 0.4])
    assert read_sum(clipped, code).mean_N == pytest.approx([1.0, 1.0])
    both = read_sum(shortened + clipped, code)
    assert (both.clipped, both.shortened, both.weight) == (2, 1, 2)


@pytest.mark.parametrize(("loss", "reported"), [(100.0, MAX_LOSS), (-1.0, 0.0)])
def test_losses_out_of_bounds_count_as_the_bound(loss, reported):
    code = FixedPoint(1.0, 1, 1)
    made = contribution(np.zeros(1), weight=1, loss=loss, code=code, max_norm=np.inf)
    assert read_sum(made, code).loss == pytest.approx(reported)


def test_a_sum_that_cannot_be_the_sites_is_refused():
    code = FixedPoint(1.0, 3, 100)
    rng = np.random.default_rng(0)
    for _ in range(100):
        garbage = rng.integers(0, 2**32, vector_size(5), dtype=np.uint32)
        with pytest.raises(ValueError, match="the sum makes no sense"):
            read_sum(garbage, code)
    with pytest.raises(ValueError, match="the sum makes no sense"):
        read_sum(np.zeros(vector_size(5), np.uint32), code)


@pytest.mark.parametrize(("count", "most"), [(-3, 300), (-2, 3 * vector_size(5)), (-1, 3)])
def test_each_count_is_held_to_the_most_that_all_sites_can_say(count, most):
    code = FixedPoint(1.0, 3, 100)
    total = np.zeros(vector_size(5), np.uint32)
    total[-3:] = (1, 0, 0)
    total[count] = most
    read_sum(total, code)
    total[count] += 1
    with pytest.raises(ValueError, match="the sum makes no sense"):
        read_sum(total, code)
