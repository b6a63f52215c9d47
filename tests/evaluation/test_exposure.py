"""Exposure against its definition, and of a model that has memorized a code."""

import math

import pytest
import torch

from fedfora.evaluation.exposure import UNSEEN, exposure


@pytest.mark.parametrize("rank", [1, 2, 5, 256])
def test_exposure_is_the_definition(rank):
    losses = torch.arange(256.0)
    losses[0] = rank - 0.5  # of the others, 1 ... 255, rank - 1 are lower
    assert exposure(losses) == pytest.approx(math.log2(256 / rank))


def test_a_model_that_cannot_tell_gives_nothing_away():
    assert exposure(torch.ones(256)) == 0


def test_codes_that_were_never_seen_have_the_stated_bits():
    generator = torch.Generator().manual_seed(0)
    found = [exposure(torch.rand(1000, generator=generator)) for _ in range(2000)]
    assert sum(found) / len(found) == pytest.approx(UNSEEN, abs=0.1)
