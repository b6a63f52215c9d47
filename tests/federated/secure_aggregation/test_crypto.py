"""Keys: two agree and a third does not; what is signed for one purpose is worthless for others."""

import dataclasses
import secrets

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.federated.secure_aggregation.crypto import (
    BLOCK_WORDS,
    Identity,
    P,
    add_mask,
    agree,
    combine,
    is_signed,
    new_private_key,
    new_secret,
    public_key,
    seal,
    split,
    subtract_mask,
    unseal,
    verify,
)


def test_two_sites_agree_on_a_secret_that_no_third_has():
    a, b, c = (new_private_key() for _ in range(3))
    secret = agree(a, public_key(b), context=b"x")
    assert secret == agree(b, public_key(a), context=b"x")
    assert len(secret) == 32
    assert secret != agree(c, public_key(b), context=b"x")
    assert secret != agree(a, public_key(b), context=b"y")


def test_the_secret_of_two_is_that_of_x25519_and_hkdf_under_our_label():
    """By the libraries alone: with another label it could be one that another program derives."""
    a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    info = b"fedfora secure aggregation\0" + b"x"
    expected = HKDF(SHA256(), 32, salt=None, info=info).derive(a.exchange(b.public_key()))
    public = b.public_key().public_bytes_raw()
    assert agree(a.private_bytes_raw(), public, context=b"x") == expected


def test_a_public_key_of_small_order_is_refused():
    with pytest.raises(ValueError, match=r"."):
        agree(new_private_key(), bytes(32), context=b"x")


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32), bytes(33), b"\1" + bytes(31)])
def test_a_signed_key_that_nobody_can_use_is_refused_where_it_is_received(public):
    identity = Identity.generate()
    for known in (identity.public_bytes, None):
        with pytest.raises(ValueError, match="site 3 is no usable X25519 key"):
            verify(identity.sign(3, public, context=b"run"), known, context=b"run")


def test_a_signature_holds_for_site_key_and_purpose_only():
    identity, other = Identity.generate(), Identity.generate()
    key = identity.sign(3, new_private_key(), context=b"round 1")
    verify(key, identity.public_bytes, context=b"round 1")
    changed = [
        (key, other.public_bytes, b"round 1"),
        (key, identity.public_bytes, b"round 2"),
        (dataclasses.replace(key, site=4), identity.public_bytes, b"round 1"),
        (dataclasses.replace(key, public=new_private_key()), identity.public_bytes, b"round 1"),
        (dataclasses.replace(key, signature=bytes(64)), identity.public_bytes, b"round 1"),
        (dataclasses.replace(key, signature=b""), identity.public_bytes, b"round 1"),
    ]
    for forged, pinned, context in changed:
        with pytest.raises(ValueError, match="not signed with that site's identity"):
            verify(forged, pinned, context=context)
    longer = dataclasses.replace(key, public=key.public + b"r")
    assert not is_signed(longer, identity.public_bytes, context=b"ound 1")


def test_what_a_site_signs_begins_with_our_label():
    """By the libraries alone: the same kind of key signs other statements elsewhere."""
    private = Ed25519PrivateKey.generate()
    key = Identity(private.private_bytes_raw()).sign(3, b"public", context=b"round 1")
    numbers = (number.to_bytes(8, "big") for number in (3, len(b"public")))
    statement = b"fedfora site key\0" + b"".join(numbers) + b"public" + b"round 1"
    private.public_key().verify(key.signature, statement)


def test_an_identity_is_its_private_bytes():
    private = new_private_key()
    assert Identity(private).public_bytes == Identity(private).public_bytes
    assert Identity.generate().public_bytes != Identity.generate().public_bytes


def test_sealed_messages_open_with_their_key_and_unchanged_only():
    key = new_private_key()
    sealed = seal(key, b"shares")
    assert unseal(key, sealed) == b"shares"
    for wrong_key, message in [(new_private_key(), sealed), (key, sealed[:-1] + b"?"), (key, b"")]:
        with pytest.raises(ValueError, match="changed or are from another round"):
            unseal(wrong_key, message)


# Masks: the keystream of AES-256-CTR, to the bit; added and taken off leaves nothing.


SEED = bytes(range(32))
sizes = st.sampled_from([0, 1, 7, BLOCK_WORDS - 1, BLOCK_WORDS, BLOCK_WORDS + 1, 3 * BLOCK_WORDS])


@given(sizes, st.binary(min_size=32, max_size=32))
def test_a_mask_is_the_keystream_in_one_piece(size, seed):
    vector = np.zeros(size, np.uint32)
    add_mask(vector, seed)
    cipher = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    assert vector.tobytes() == cipher.update(bytes(4 * size))


@given(sizes, st.binary(min_size=32, max_size=32))
def test_what_is_added_can_be_taken_off(size, seed):
    vector = np.arange(size, dtype=np.uint32) * np.uint32(77_777)
    kept = vector.copy()
    add_mask(vector, seed)
    subtract_mask(vector, seed)
    assert np.array_equal(vector, kept)


def test_the_published_first_block_of_aes_256():
    """FIPS 197, appendix C.3, moved into the counter: E(00112233...) is not zero's block, so ask it
    of the cipher with that block as the counter."""
    cipher = Cipher(
        algorithms.AES(SEED), modes.CTR(bytes.fromhex("00112233445566778899aabbccddeeff"))
    )
    assert cipher.encryptor().update(bytes(16)).hex() == "8ea2b7ca516745bfeafc49904b496089"


def test_one_other_bit_in_the_seed_gives_another_mask():
    one, other = np.zeros(100_000, np.uint32), np.zeros(100_000, np.uint32)
    add_mask(one, SEED)
    add_mask(other, SEED[:-1] + bytes([SEED[-1] ^ 1]))
    assert (one == other).mean() < 1e-4


@pytest.mark.parametrize("length", [4, 16, 31, 33])
def test_shorter_seeds_are_refused(length):
    with pytest.raises(ValueError, match="32 bytes"):
        add_mask(np.zeros(1, np.uint32), bytes(length))


# Shares: any threshold of them gives the secret back, one fewer gives nothing.


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
    with pytest.raises(ValueError, match="4 shares are needed, there are 3"):
        combine(few, threshold=4)
    assert combine(few, threshold=3) != secret
    guesses = [combine({**few, 6: secrets.token_bytes(32)}, threshold=4) for _ in range(20)]
    assert secret not in guesses
    assert len(set(guesses)) == 20  # any secret fits three shares equally well


def test_secrets_and_what_hides_them_are_drawn_from_all_numbers():
    """Small coefficients would give the secret away with one share."""
    secrets_ = [new_secret() for _ in range(20)]
    shares = split(secrets_[0], threshold=20, num_shares=20)
    _, *coefficients = solved(dict(enumerate(shares, start=1)), 20)
    for numbers in (coefficients, [int.from_bytes(secret, "big") for secret in secrets_]):
        assert len(set(numbers)) == len(numbers)
        assert max(numbers) > 2**250


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
    for number in (P, 2**256 - 1):
        with pytest.raises(ValueError, match="below 2"):
            split(number.to_bytes(32, "big"), threshold=1, num_shares=1)


def test_a_wrong_share_gives_a_wrong_secret():
    secret = new_secret()
    shares = dict(enumerate(split(secret, threshold=3, num_shares=3), start=1))
    shares[2] = secrets.token_bytes(32)
    assert combine(shares, threshold=3) != secret


@pytest.mark.parametrize(("length", "threshold"), [(31, 2), (64, 2), (32, 0), (32, 5)])
def test_what_cannot_be_shared_is_refused(length, threshold):
    with pytest.raises(ValueError, match="expected 32 bytes and a threshold of 1 to 4"):
        split(bytes(length), threshold=threshold, num_shares=4)
