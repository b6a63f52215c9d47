"""Nobody counts with more than the clipping norm."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedfora.privacy.clipping import SecretNoise, clip, clipped_sum


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


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_bounds_nothing_is_refused(clipping_norm):
    with pytest.raises(ValueError, match="clipping_norm"):
        clipped_sum(gradients(1, 2, 1.0), clipping_norm)


# The secret stream: uniform, normal, and never the same.


KEY = bytes(range(32))


@pytest.mark.parametrize("byte", [0, 255])
def test_whatever_the_bits_are_the_noise_is_finite(byte):
    noise = SecretNoise(KEY)
    noise._stream = SimpleNamespace(update=lambda zeros: bytes([byte]) * len(zeros))
    assert 0 < float(noise.uniform(1)) < 1
    assert noise.normal((1,), 1.0).isfinite().all()


def test_global_seeds_do_not_repeat_the_noise():
    def draw():
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002  # the very thing that must have no effect
        random.seed(7)
        return SecretNoise().normal((64,), 1.0)

    assert not torch.equal(draw(), draw())


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    noise = SecretNoise()
    noise.normal((10,), 1.0)
    noise.sample(10, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_never_returns():
    noise = SecretNoise(KEY)
    assert not torch.equal(noise.normal((100,), 1.0), noise.normal((100,), 1.0))
    assert torch.equal(SecretNoise(KEY).uniform(9), SecretNoise(KEY).uniform(9))


def test_numbers_follow_their_distributions():
    """Under a fixed key, so the outcome is fixed too: Kolmogorov-Smirnov at n = 200,000."""
    noise = SecretNoise(KEY)
    uniform, normal = noise.uniform(200_000), noise.normal((400, 500), 3.0).flatten()
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(normal.double().numpy() / 3, "norm").pvalue > 0.01


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_each_row_is_drawn_alone_with_the_given_probability(rate):
    noise, rows, draws = SecretNoise(KEY), 50, 4000
    counts = torch.zeros(draws, rows)
    for draw in range(draws):
        counts[draw, noise.sample(rows, rate)] = 1
    spread = (rate * (1 - rate) / draws) ** 0.5
    assert (counts.mean(0) - rate).abs().max() < 5 * spread
    sizes = counts.sum(1)
    assert sizes.var() == pytest.approx(rows * rate * (1 - rate), rel=0.1)  # binomial, not fixed


def test_rate_one_takes_every_row_and_no_std_is_no_noise():
    assert SecretNoise(KEY).sample(5, 1.0) == [0, 1, 2, 3, 4]
    assert SecretNoise(KEY).sample(0, 0.5) == []
    assert torch.equal(SecretNoise(KEY).normal((2, 3), 0.0), torch.zeros(2, 3))


def discrete_pmf(std, furthest):
    """Probabilities of -furthest ... furthest; what lies beyond is below 1e-30 of all."""
    weights = np.exp(-(np.arange(-furthest, furthest + 1) ** 2) / (2.0 * std**2))
    return weights / weights.sum()


@pytest.mark.parametrize("std", [1, 2, 3, 7, 40])
def test_discrete_noise_has_the_exact_probabilities(std):
    """With a fixed key the test is the same each time; a wrong law of 1 % shows as p < 1e-9."""
    furthest, count = 12 * std, 400_000
    drawn = SecretNoise(KEY).discrete_normal(count, std)
    expected = count * discrete_pmf(std, furthest)
    seen = np.bincount(drawn + furthest, minlength=2 * furthest + 1)
    common = expected > 20
    rest = [count - seen[common].sum()], [count - expected[common].sum()]
    observed, wanted = (
        np.append(a[common], b) for a, b in zip((seen, expected), rest, strict=True)
    )
    keep = wanted > 5
    wanted[keep] *= observed[keep].sum() / wanted[keep].sum()
    assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


@pytest.mark.parametrize("std", [1_000, 2**31 - 1, 2**40])
def test_wide_discrete_noise_is_normal_but_for_the_grid(std):
    drawn = SecretNoise(KEY).discrete_normal(200_000, std) / std
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


def test_uniform_integers_are_uniform_where_the_words_do_not_divide():
    """Two thirds of 2**62 words more fall below a third of the range if none is drawn again."""
    limit = 3 * 2**61
    assert limit <= 2**63
    drawn = SecretNoise(KEY)._below(limit, 30_000)
    assert stats.kstest(drawn / limit, "uniform").pvalue > 1e-3
    assert set(SecretNoise(KEY)._below(5, 1000)) == set(range(5))


def test_discrete_noise_is_drawn_anew_each_time_and_to_the_number():
    assert not np.array_equal(*(SecretNoise().discrete_normal(50, 10**6) for _ in range(2)))
    for count in (0, 1, 7, 2**17 + 3):
        assert SecretNoise().discrete_normal(count, 9).shape == (count,)


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("moved", [5, 40, 150])
def test_discrete_noise_a_step_wider_is_no_worse_than_the_normal_it_is_accounted_as(shares, moved):
    """delta at every epsilon, from the probabilities themselves; the normal's is Balle and Wang's
    closed form (https://arxiv.org/abs/1805.06530, Thm. 8). Without the step, it is worse."""
    normal_std = 40
    furthest = 14 * normal_std

    def delta(std, epsilon):
        one = discrete_pmf(std, furthest)
        pmf = one
        for _ in range(shares - 1):
            pmf = np.convolve(pmf, one)
        there, here = np.append(np.zeros(moved), pmf), np.append(pmf, np.zeros(moved))
        return np.maximum(here - np.exp(epsilon) * there, 0).sum()

    ratio = moved / (normal_std * shares**0.5)
    for epsilon in np.linspace(0, 6 * ratio, 60):
        normal = stats.norm.cdf(ratio / 2 - epsilon / ratio)
        normal -= np.exp(epsilon) * stats.norm.cdf(-ratio / 2 - epsilon / ratio)
        assert delta(normal_std + 1, epsilon) <= normal + 1e-13
