"""Shares: any threshold of them gives the secret back, one fewer gives nothing."""

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.federated.secure_aggregation.shares import combine, split


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_threshold_of_shares_gives_the_secret_back(data):
    num_shares = data.draw(st.integers(2, 9))
    threshold = data.draw(st.integers(1, num_shares))
    secret = data.draw(st.binary(min_size=32, max_size=32))
    shares = split(secret, threshold=threshold, num_shares=num_shares)
    held = data.draw(st.sets(st.integers(1, num_shares), min_size=threshold))
    assert combine({i: shares[i - 1] for i in held}, threshold=threshold) == secret


def test_a_share_too_few_is_refused_and_would_give_nothing():
    secret = secrets.token_bytes(32)
    shares = dict(enumerate(split(secret, threshold=4, num_shares=6), start=1))
    few = {i: shares[i] for i in (1, 2, 5)}
    with pytest.raises(ValueError, match="3 shares, but 4 are needed"):
        combine(few, threshold=4)
    assert combine(few, threshold=3) != secret
    guesses = [combine({**few, 6: secrets.token_bytes(32)}, threshold=4) for _ in range(20)]
    assert secret not in guesses
    assert len(set(guesses)) == 20  # any secret fits three shares equally well


def test_a_wrong_share_gives_a_wrong_secret():
    secret = secrets.token_bytes(32)
    shares = dict(enumerate(split(secret, threshold=3, num_shares=3), start=1))
    shares[2] = secrets.token_bytes(32)
    assert combine(shares, threshold=3) != secret


@pytest.mark.parametrize(("length", "threshold"), [(31, 2), (64, 2), (32, 0), (32, 5)])
def test_what_cannot_be_shared_is_refused(length, threshold):
    with pytest.raises(ValueError, match="expected 32 bytes and a threshold of 1 to 4"):
        split(bytes(length), threshold=threshold, num_shares=4)
