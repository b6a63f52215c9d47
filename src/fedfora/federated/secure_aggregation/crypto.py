"""Keys of a site: who it is (Ed25519), whom it can talk to (X25519), and what only two can read.

A site's identity is made once, at provisioning, and every other site holds its public half. With it
the site signs the short-lived keys of a run and of a round, so the coordinator, through which all
of them travel, cannot put keys of its own in between.
"""

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NONCE = bytes(12)  # each sealing key is derived for one message of one round


@dataclass(frozen=True)
class SignedKey:
    """A site's X25519 public key with its signature under the site's identity."""

    site: int
    public: bytes
    signature: bytes


class Identity:
    """A site's long-term signing key."""

    def __init__(self, private_bytes: bytes) -> None:
        """Make the identity from the 32 bytes of an Ed25519 private key."""
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
    statement = _statement(key.site, key.public, context)
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(key.signature, statement)
    except InvalidSignature:
        return False
    return True


def verify(key: SignedKey, identity: bytes, *, context: bytes) -> None:
    """Raise unless the holder of `identity` signed this key for this very purpose.

    Raises:
        ValueError: If the signature does not fit.
    """
    if not is_signed(key, identity, context=context):
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
    """Return what was sealed.

    Raises:
        ValueError: If it was sealed with another key, or changed on its way.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(NONCE, sealed, None)
    except InvalidTag:
        raise ValueError("the sealed shares were changed or are from another round") from None


def _statement(site: int, public: bytes, context: bytes) -> bytes:
    length = len(public).to_bytes(8, "big")  # so that no other split of the bytes is meant
    return b"fedfora site key\0" + site.to_bytes(8, "big") + length + public + context
