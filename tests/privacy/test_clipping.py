"""Nobody counts with more than the clipping norm."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfora.privacy.clipping import add_noise, clip, clipped_sum, noise_share_std
from fedfora.privacy.noise import SecretNoise


def gradients(seed, examples, scale):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (examples, 2, 5), "E": (examples, 2, 2), "D": (examples, 7, 2)}
    return {n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()}


def length(tensors):
    return float(torch.cat([t.double().flatten() for t in tensors.values()]).norm())


@given(
    st.integers(0, 1000),
    st.integers(1, 6),
    st.floats(1e-4, 1e4),
    st.floats(1e-3, 1e3),
    st.integers(0, 5),
)
def test_one_example_moves_the_sum_by_at_most_the_clipping_norm(
    seed, examples, scale, clipping_norm, left_out
):
    """The sensitivity that the noise is made for: add or remove any one example."""
    whole = gradients(seed, examples, scale)
    rest = [i for i in range(examples) if i != left_out % examples]
    summed = clipped_sum(whole, clipping_norm)
    without = clipped_sum({name: g[rest] for name, g in whole.items()}, clipping_norm)
    moved = length({name: summed[name] - without[name] for name in summed})
    assert moved <= clipping_norm * (1 + 1e-4)


def test_an_infinite_clip_is_a_plain_sum_and_a_wide_one_too():
    given_ = gradients(1, 4, 1.0)
    for clipping_norm in (float("inf"), 1e9):
        for name, summed in clipped_sum(given_, clipping_norm).items():
            torch.testing.assert_close(summed, given_[name].sum(0))


def test_clipping_keeps_the_direction():
    one = gradients(2, 1, 10.0)
    summed = clipped_sum(one, 0.5)
    assert length(summed) == pytest.approx(0.5, rel=1e-5)
    shrunk = length(summed) / length(one)
    for name in one:
        torch.testing.assert_close(summed[name], shrunk * one[name][0])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_example_is_left_out_and_the_others_stay(broken):
    given_ = gradients(3, 3, 1.0)
    given_["A"][1, 0, 0] = broken
    others = {name: g[[0, 2]] for name, g in given_.items()}
    for name, summed in clipped_sum(given_, 1.0).items():
        torch.testing.assert_close(summed, clipped_sum(others, 1.0)[name])


def test_an_update_within_the_norm_is_untouched_and_a_zero_update_is_fine():
    update = {"A": torch.tensor([0.3, -0.4]), "D": torch.zeros(2)}
    assert all(torch.equal(clip(update, 0.5)[name], update[name]) for name in update)
    zero = {"A": torch.zeros(3)}
    assert torch.equal(clip(zero, 1.0)["A"], torch.zeros(3))
    assert length(clip({"A": torch.tensor([3.0, 4.0])}, 1.0)) == pytest.approx(1.0)
    assert length(clip({"A": torch.tensor([3.0, float("nan")])}, 1.0)) == 0


def test_no_examples_sum_to_nothing():
    none = {"A": torch.zeros(0, 2, 3)}
    assert torch.equal(clipped_sum(none, 1.0)["A"], torch.zeros(2, 3))


def test_shared_noise_adds_up_to_central_noise():
    """Under a fixed key: 16 shares of 10,000 numbers each, against z C."""
    noise, sites = SecretNoise(bytes(32)), 16
    zero = {"A": torch.zeros(100, 100)}
    std = noise_share_std(2.0, 0.5, sites)
    total = sum(add_noise(zero, std, noise)["A"] for _ in range(sites))
    assert float(total.std()) == pytest.approx(2.0 * 0.5, rel=0.03)


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_bounds_nothing_is_refused(clipping_norm):
    with pytest.raises(ValueError, match="clipping_norm"):
        clipped_sum(gradients(1, 2, 1.0), clipping_norm)
