"""What travels: folding keeps the function, unfolding is the same everywhere."""

import pytest
import torch

from fedfora.adapter.state import check_same_layout, fold, layers_of, unfold

R, I, O, M = 3, 16, 10, 4


@pytest.fixture
def state():
    g = torch.Generator().manual_seed(0)
    shapes = {"A": (R, I), "B": (M, R), "C": (R, M), "D": (O, R), "E": (R, R)}
    return {
        f"{layer}.{factor}": torch.randn(shape, generator=g)
        for layer in ("model.layers.0.q_proj", "model.layers.1.q_proj")
        for factor, shape in shapes.items()
    }


def update(state, layer):
    A, B, C, D, E = (state[f"{layer}.{f}"].double() for f in "ABCDE")
    return D @ (torch.eye(R).double() + E + C @ B) @ A


def test_folding_and_unfolding_keep_the_update(state):
    back = unfold(fold(state), seed=1)
    assert back.keys() == state.keys()
    for layer in layers_of(state):
        torch.testing.assert_close(update(back, layer), update(state, layer), rtol=1e-5, atol=1e-5)


def test_the_inner_factors_do_not_travel(state):
    assert {name.rsplit(".", 1)[1] for name in fold(state)} == {"A", "D", "E"}


def test_folding_twice_changes_nothing(state):
    once = fold(state)
    twice = fold(unfold(once, seed=1))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_c_is_the_same_for_the_same_seed_and_another_for_every_layer(state):
    one, same, other = (unfold(fold(state), seed=seed) for seed in (1, 1, 2))
    first, second = (f"{layer}.C" for layer in layers_of(state))
    assert torch.equal(one[first], same[first])
    assert not torch.equal(one[first], other[first])
    assert not torch.equal(one[first], one[second])


def test_a_missing_name_and_a_wrong_shape_are_named(state):
    name = "model.layers.0.q_proj.A"
    with pytest.raises(ValueError, match=f"{name} is missing"):
        check_same_layout({k: v for k, v in state.items() if k != name}, state)
    with pytest.raises(ValueError, match=r"shape \(1, 16\), expected \(3, 16\)"):
        check_same_layout({**state, name: state[name][:1]}, state)
