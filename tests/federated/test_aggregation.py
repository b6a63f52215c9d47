"""Laws that every registered rule obeys; a new rule is covered by being registered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.federated.aggregation import RULES

I, O, R = 9, 7, 3


def random_update(seed, rank=R):
    g = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, I), "D": (O, rank), "E": (rank, rank)}
    return {
        f"{layer}.{factor}": torch.randn(shape, generator=g)
        for layer in ("q", "v")
        for factor, shape in shapes.items()
    }


def dense(update, layer="q"):
    A, D, E = (update[f"{layer}.{f}"].double() for f in "ADE")
    return D @ (torch.eye(len(A)).double() + E) @ A


@pytest.fixture(params=list(RULES))
def rule(request):
    return RULES[request.param]


def assert_same_function(one, other, **tolerance):
    for layer in ("q", "v"):
        torch.testing.assert_close(dense(one, layer), dense(other, layer), **tolerance)


def test_identical_clients_are_a_fixed_point(rule):
    update = random_update(0)
    result = rule([(update, w) for w in (1.0, 5.0, 2.5)])
    assert_same_function(result, update, rtol=1e-4, atol=1e-5)


def test_the_order_of_clients_does_not_matter(rule):
    pairs = [(random_update(k), 1.0 + k) for k in range(4)]
    assert_same_function(rule(pairs), rule(pairs[::-1]), rtol=1e-4, atol=1e-5)


def test_weights_count_only_in_proportion(rule):
    pairs = [(random_update(k), 1.0 + k) for k in range(3)]
    scaled = [(update, 1000 * w) for update, w in pairs]
    assert_same_function(rule(pairs), rule(scaled), rtol=1e-4, atol=1e-5)


def test_inputs_are_not_modified(rule):
    update = random_update(0)
    before = {name: value.clone() for name, value in update.items()}
    rule([(update, 1.0), (random_update(1), 2.0)])
    assert all(torch.equal(before[name], update[name]) for name in update)


def test_results_are_float32_whatever_came_in(rule):
    halves = {name: value.half() for name, value in random_update(0).items()}
    assert {value.dtype for value in rule([(halves, 1.0)]).values()} == {torch.float32}


def test_a_stream_of_updates_is_enough(rule):
    pairs = [(random_update(k), 1.0) for k in range(3)]
    assert_same_function(rule(iter(pairs)), rule(pairs))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(rule, weight):
    with pytest.raises(ValueError, match="positive and finite"):
        rule([(random_update(0), weight)])


def test_nobody_is_refused(rule):
    with pytest.raises(ValueError, match="no site sent an update"):
        rule([])


def test_fedavg_by_hand():
    updates = [({"p": torch.tensor([1.0])}, 3.0), ({"p": torch.tensor([5.0])}, 1.0)]
    assert RULES["fedavg"](updates)["p"].item() == 2.0  # (3 * 1 + 1 * 5) / 4


def test_one_client_is_taken_over_to_the_bit_by_fedavg():
    update = random_update(0)
    result = RULES["fedavg"]([(update, 12345.0)])
    assert all(torch.equal(result[name], update[name]) for name in update)


def test_naive_averaging_is_not_the_mean_update():
    pairs = [(random_update(k), 1.0) for k in range(3)]
    mean = sum(dense(u) for u, _ in pairs) / 3
    assert (dense(RULES["fedavg"](pairs)) - mean).norm() > 0.3 * mean.norm()


@settings(deadline=None, max_examples=20)
@given(weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=4))
def test_refactor_is_the_best_rank_r_approximation_of_the_dense_mean(weights):
    """Against numpy's SVD of the dense matrix (Eckart and Young)."""
    pairs = [(random_update(k), w) for k, w in enumerate(weights)]
    mean = sum(w * dense(u) for u, w in pairs) / sum(weights)
    U, S, Vh = torch.linalg.svd(mean)
    best = U[:, :R] @ torch.diag(S[:R]) @ Vh[:R]
    torch.testing.assert_close(dense(RULES["refactor"](pairs)), best, rtol=1e-4, atol=1e-5)


def test_refactor_is_exact_where_the_mean_has_no_larger_rank():
    """Sites that share A differ by D K alone, so their mean has rank R."""
    first, second = random_update(0), random_update(1)
    for layer in ("q", "v"):
        second[f"{layer}.A"] = first[f"{layer}.A"]
    mean = (dense(first) + dense(second)) / 2
    result = RULES["refactor"]([(first, 1.0), (second, 1.0)])
    torch.testing.assert_close(dense(result), mean, rtol=1e-4, atol=1e-5)


def test_refactor_takes_sites_of_different_ranks():
    small, large = random_update(0, rank=1), random_update(1, rank=2)
    mean = (dense(small) + dense(large)) / 2
    result = RULES["refactor"]([(small, 1.0), (large, 1.0)])
    assert result["q.A"].shape == (2, I)
    U, S, Vh = torch.linalg.svd(mean)
    best = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]
    torch.testing.assert_close(dense(result), best, rtol=1e-4, atol=1e-5)


def test_an_unknown_rule_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'fedavg'"):
        RULES["fedavgg"]
