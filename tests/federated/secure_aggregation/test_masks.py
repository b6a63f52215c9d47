"""Masks: the keystream of AES-256-CTR, to the bit; added and taken off leaves nothing."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fedfora.federated.secure_aggregation.masks import BLOCK_WORDS, add_mask, subtract_mask

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
