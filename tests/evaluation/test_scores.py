"""Intervals cover what they should, narrow with more rows, and are exact where nothing varies."""

import numpy as np
import pytest

from fedfora.evaluation.scores import interval, resampled_sums
from fedfora.metrics import mean


def mean_interval(values, seed=0):
    counts = np.stack([values, np.ones(len(values))], axis=1)
    return interval(resampled_sums(counts, seed=seed), mean)


def test_they_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = mean_interval(rng.random(100) < 0.3, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_they_agree_with_the_normal_interval_of_a_mean():
    values = np.random.default_rng(1).normal(size=400)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_equal_rows_have_no_uncertainty():
    assert mean_interval(np.full(20, 0.25)) == (0.25, 0.25)


def test_every_sample_has_as_many_rows():
    sums = resampled_sums(np.ones((7, 1)), seed=0, resamples=50)
    assert sums.shape == (50, 1)
    assert (sums == 7).all()


def test_drawing_in_pieces_draws_every_sample(monkeypatch):
    from fedfora.evaluation import scores

    monkeypatch.setattr(scores, "_CHUNK", 20)
    sums = resampled_sums(np.arange(9.0)[:, None], seed=0, resamples=11)
    assert sums.shape == (11, 1)
    assert len(np.unique(sums)) > 5
