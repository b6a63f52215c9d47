"""Canaries follow from the seed, go to one site, and differ from their alternatives in the code."""

import pytest

from fedfora.data.canaries import alternatives, canaries, planted
from fedfora.data.settings import DataArguments


def test_the_seed_makes_the_canaries_and_more_of_them_keep_the_first():
    assert canaries(3, seed=1) == canaries(5, seed=1)[:3]
    assert canaries(3, seed=1) != canaries(3, seed=2)
    prompts = [row.prompt for row in canaries(50, seed=1)]
    assert len(set(prompts)) == 50


def test_one_site_trains_on_them_as_often_as_asked():
    settings = DataArguments(canaries=3, canary_site=1, canary_copies=4)
    assert planted(settings, site=0, seed=7) == []
    rows = planted(settings, site=1, seed=7)
    assert len(rows) == 12
    assert {row.output for row in rows} == {row.output for row in canaries(3, seed=7)}
    assert planted(DataArguments(), site=0, seed=7) == []


def test_an_alternative_asks_the_same_and_answers_otherwise():
    canary = canaries(2, seed=3)[1]
    others = alternatives(1, 200, seed=3)
    assert {row.prompt for row in others} == {canary.prompt}
    codes = {row.output for row in others}
    assert len(codes) == 200
    assert canary.output not in codes
    assert all(len(code) == len(canary.output) for code in codes)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="--canaries must be at least 0"):
        DataArguments(canaries=-1)
