"""A site's keys: who it is (Ed25519), whom it can talk to (X25519), and what only two can read.

A site's identity is made once, at provisioning, and every other site holds its public half. With it
the site signs the short-lived keys of a run and of a round, so the coordinator, through which all
of them travel, cannot put keys of its own in between.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedfora.federated.secure_aggregation.fixed_point import Words
from fedfora.protection.keys import key_id, verifies

NONCE = bytes(12)  # each sealing key is derived for one message of one round


@dataclass(frozen=True)
class SignedKey:
    """A site's X25519 public key with its signature under the site's identity."""

    site: int
    public: bytes
    signature: bytes


class Identity:
    """A site's long-term signing key, made from the 32 bytes of an Ed25519 private key."""

    def __init__(self, private_bytes: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(private_bytes)

    @classmethod
    def generate(cls) -> "Identity":
        """Return a new identity."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def public_bytes(self) -> bytes:
        """The 32 bytes that all other sites hold."""
        return self._private.public_key().public_bytes_raw()

    def sign(self, site: int, public: bytes, *, context: bytes) -> SignedKey:
        """Sign a key, or another content, for one purpose: `context` names it, and the round."""
        return SignedKey(site, public, self._private.sign(_statement(site, public, context)))


def is_signed(key: SignedKey, identity: bytes, *, context: bytes) -> bool:
    """Return whether the holder of `identity` signed this key for this very purpose."""
    return verifies(identity, key.signature, _statement(key.site, key.public, context))


def verify(key: SignedKey, identity: bytes | None, *, context: bytes) -> None:
    """Raise unless the holder of `identity`, if it is known, signed this key for this very purpose.

    Raises:
        ValueError: If the signature is not valid, or nobody can agree on a secret with the key.
    """
    try:
        agree(new_private_key(), key.public, context=context)
    except ValueError:
        raise ValueError(f"the public key of site {key.site} is no usable X25519 key") from None
    if identity is not None and not is_signed(key, identity, context=context):
        raise ValueError(
            f"the key said to come from site {key.site} is not signed with that site's identity "
            "for this run and round: somebody in between changed or replayed it"
        )


def new_private_key() -> bytes:
    """Return the 32 bytes of a new X25519 private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Return the 32 bytes of the public half."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, *, context: bytes) -> bytes:
    """Return the 32 bytes that only the two holders know, for one purpose (X25519, HKDF-SHA256).

    Raises:
        ValueError: If the public key is one of the few that lead to a known secret.
    """
    secret = X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(public)
    )
    return HKDF(SHA256(), 32, salt=None, info=b"fedfora secure aggregation\0" + context).derive(
        secret
    )


def seal(key: bytes, plain: bytes) -> bytes:
    """Encrypt and authenticate one message under a key made for it (ChaCha20-Poly1305)."""
    return ChaCha20Poly1305(key).encrypt(NONCE, plain, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Return what was sealed; raise if it was sealed with another key, or changed in transit."""
    try:
        return ChaCha20Poly1305(key).decrypt(NONCE, sealed, None)
    except InvalidTag:
        raise ValueError("the sealed shares were changed or are from another round") from None


def _statement(site: int, public: bytes, context: bytes) -> bytes:
    length = len(public).to_bytes(8, "big")  # so that the bytes cannot be split differently
    return b"fedfora site key\0" + site.to_bytes(8, "big") + length + public + context


# A mask: as many uniform words as a vector has, from a seed of 256 bits.
# AES-256 in counter mode over zeros, from `cryptography`. A seed is used for one mask only, so the
# counter may start at zero. Flower's own secure aggregation seeds a Mersenne twister with 32 bits,
# which two cores search in minutes; 256 bits cannot be searched.

SEED_BYTES = 32
BLOCK_WORDS = 2**16  # small enough to stay in the processor's cache


def add_mask(vector: Words, seed: bytes) -> None:
    """Add the seed's mask to a vector in place, modulo 2^32."""
    _apply(vector, seed, np.add)


def subtract_mask(vector: Words, seed: bytes) -> None:
    """Take the seed's mask off a vector in place, modulo 2^32."""
    _apply(vector, seed, np.subtract)


def _apply(vector: Words, seed: bytes, operation: np.ufunc) -> None:
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a mask's seed has {SEED_BYTES} bytes, got {len(seed)}")
    keystream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = bytes(4 * BLOCK_WORDS), bytearray(4 * BLOCK_WORDS)
    mask = np.frombuffer(buffer, dtype="<u4")
    for start in range(0, len(vector), BLOCK_WORDS):
        block = vector[start : start + BLOCK_WORDS]
        keystream.update_into(zeros, buffer)
        operation(block, mask[: len(block)], out=block)


# A secret of 256 bits in shares, of which a threshold is needed and fewer reveal nothing.
# Shamir's scheme (1979, https://doi.org/10.1145/359168.359176) over the integers modulo a prime p:
# a random polynomial f of degree t - 1 with f(0) the secret; share i is f(i). Python multiplies
# such integers natively, so this is some hundred times faster than pycryptodome's scheme over
# GF(2^128), which a round of 500 sites kept busy for a minute.

P = 2**256 - 189  # the largest prime below 2^256


def new_secret() -> bytes:
    """Return 32 random bytes that can be shared: a number below p."""
    return secrets.randbelow(P).to_bytes(SEED_BYTES, "big")


def split(secret: bytes, *, threshold: int, num_shares: int) -> list[bytes]:
    """Return the shares; entry i has index i + 1.

    Args:
        secret: 32 bytes, a number below p; all but a share of 2^-248 of them are.
        threshold: How many shares bring the secret back.
        num_shares: How many shares to make.

    Raises:
        ValueError: If the secret is not 32 bytes below p, or the numbers are inconsistent.
    """
    if len(secret) != SEED_BYTES or not 1 <= threshold <= num_shares:
        raise ValueError(
            f"expected 32 bytes and a threshold of 1 to {num_shares}, got {len(secret)} bytes and "
            f"{threshold}"
        )
    constant = int.from_bytes(secret, "big")
    if constant >= P:
        raise ValueError("a secret must be a number below 2^256 - 189")
    coefficients = [constant, *(secrets.randbelow(P) for _ in range(threshold - 1))]
    return [_at(coefficients, x).to_bytes(SEED_BYTES, "big") for x in range(1, num_shares + 1)]


def combine(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """Return the secret from shares by index.

    A wrong share gives a wrong secret and no error: the caller must be able to check.

    Raises:
        ValueError: If there are fewer shares than the threshold.
    """
    if len(shares) < threshold:
        raise ValueError(f"{threshold} shares are needed, there are {len(shares)}")
    chosen = sorted(shares)[:threshold]
    weights = _weights(tuple(chosen))
    total = sum(
        weight * int.from_bytes(shares[index], "big")
        for index, weight in zip(chosen, weights, strict=True)
    )
    return (total % P).to_bytes(SEED_BYTES, "big")


def _at(coefficients: Sequence[int], x: int) -> int:
    """Return the polynomial's value by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % P
    return value


@lru_cache(maxsize=256)  # most sites of a round have their shares at the same places
def _weights(indices: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights: f(0) is the sum of them times f at the indices."""
    weights = []
    for i in indices:
        others = [j for j in indices if j != i]
        weights.append(prod(others) * pow(prod(j - i for j in others), -1, P) % P)
    return tuple(weights)


# A site's signed statement that it takes part, and its prompts' digest: it writes, others read.

TAKES_PART = b"takes part\0"


def prompts_digest(prompts: Any) -> str:
    """Return a digest of a prompt format, as JSON has it."""
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:32]


def verify_participation(public: Any, signature: Any, index: int, base: str) -> str:
    """Return the id of the key with which a site signed that it takes part.

    Key and signature are what the site sent, of whatever type: `bytes(n)` would take n bytes.

    Raises:
        ValueError: If it did not sign this.
    """
    if (
        not isinstance(public, bytes)
        or not isinstance(signature, bytes)
        or not is_signed(SignedKey(index, base.encode(), signature), public, context=TAKES_PART)
    ):
        raise ValueError(f"site {index} did not sign with the key that it shows")
    return key_id(public)
