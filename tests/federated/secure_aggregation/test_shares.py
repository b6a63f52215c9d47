"""Shares: any threshold of them gives the secret back, one fewer gives nothing."""

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.federated.secure_aggregation.shares import P, combine, new_secret, split


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_threshold_of_shares_gives_the_secret_back(data):
    num_shares = data.draw(st.integers(2, 9))
    threshold = data.draw(st.integers(1, num_shares))
    secret = data.draw(st.integers(0, P - 1)).to_bytes(32, "big")
    shares = split(secret, threshold=threshold, num_shares=num_shares)
    held = data.draw(st.sets(st.integers(1, num_shares), min_size=threshold))
    assert combine({i: shares[i - 1] for i in held}, threshold=threshold) == secret


def test_a_share_too_few_is_refused_and_would_give_nothing():
    secret = new_secret()
    shares = dict(enumerate(split(secret, threshold=4, num_shares=6), start=1))
    few = {i: shares[i] for i in (1, 2, 5)}
    with pytest.raises(ValueError, match="3 shares, but 4 are needed"):
        combine(few, threshold=4)
    assert combine(few, threshold=3) != secret
    guesses = [combine({**few, 6: secrets.token_bytes(32)}, threshold=4) for _ in range(20)]
    assert secret not in guesses
    assert len(set(guesses)) == 20  # any secret fits three shares equally well


def solved(shares, threshold):
    """The polynomial's coefficients from its values, by elimination modulo p."""
    rows = [
        [pow(i, power, P) for power in range(threshold)] + [int.from_bytes(share, "big")]
        for i, share in list(shares.items())[:threshold]
    ]
    for column in range(threshold):
        pivot = next(r for r in range(column, threshold) if rows[r][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        inverse = pow(rows[column][column], -1, P)
        rows[column] = [value * inverse % P for value in rows[column]]
        for r in range(threshold):
            if r != column:
                factor = rows[r][column]
                pairs = zip(rows[r], rows[column], strict=True)
                rows[r] = [(value - factor * own) % P for value, own in pairs]
    return [row[-1] for row in rows]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, P - 1))
def test_shares_lie_on_one_polynomial_of_the_right_degree_with_the_secret_at_zero(t, more, number):
    shares = split(number.to_bytes(32, "big"), threshold=t, num_shares=t + more)
    coefficients = solved(dict(enumerate(shares, start=1)), t)
    assert coefficients[0] == number
    for x, share in enumerate(shares, start=1):
        value = sum(c * pow(x, power, P) for power, c in enumerate(coefficients)) % P
        assert value == int.from_bytes(share, "big")


def test_the_modulus_is_prime_and_secrets_lie_below_it():
    odd, twos = P - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in range(2, 60):  # Miller and Rabin
        powers = [pow(witness, odd * 2**k, P) for k in range(twos)]
        assert powers[0] == 1 or P - 1 in powers
    assert all(int.from_bytes(new_secret(), "big") < P for _ in range(100))
    with pytest.raises(ValueError, match="below 2"):
        split(b"\xff" * 32, threshold=1, num_shares=1)


def test_a_wrong_share_gives_a_wrong_secret():
    secret = new_secret()
    shares = dict(enumerate(split(secret, threshold=3, num_shares=3), start=1))
    shares[2] = secrets.token_bytes(32)
    assert combine(shares, threshold=3) != secret


@pytest.mark.parametrize(("length", "threshold"), [(31, 2), (64, 2), (32, 0), (32, 5)])
def test_what_cannot_be_shared_is_refused(length, threshold):
    with pytest.raises(ValueError, match="expected 32 bytes and a threshold of 1 to 4"):
        split(bytes(length), threshold=threshold, num_shares=4)
