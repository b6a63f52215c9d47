"""The secret stream: uniform, normal, and never the same."""

import random

import numpy as np
import pytest
import torch
from scipy import stats

from fedfora.privacy.noise import SecretNoise

KEY = bytes(range(32))


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
