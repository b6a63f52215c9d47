"""A site's signed word that it takes part: written by the site, read by the coordinator."""

from fedfora.federated.secure_aggregation.crypto import Identity, SignedKey, verify
from fedfora.protection.keys import key_id

TAKES_PART = b"takes part\0"


def sign_participation(identity: Identity, index: int, base: str) -> dict[str, bytes]:
    """Return a site's public key, and its signature under its number and its base.

    Args:
        identity: The site's.
        index: Its number.
        base: Fingerprint of the base that it trains on.
    """
    signed = identity.sign(index, base.encode(), context=TAKES_PART)
    return {"public-key": identity.public_bytes, "signature": signed.signature}


def verify_participation(public: bytes, signature: bytes, index: int, base: str) -> str:
    """Return the id of the key with which a site signed that it takes part.

    Raises:
        ValueError: If it did not sign this.
    """
    try:
        verify(SignedKey(index, base.encode(), signature), public, context=TAKES_PART)
    except ValueError:
        raise ValueError(f"site {index} did not sign with the key that it shows") from None
    return key_id(public)
