"""Keys: two agree and a third does not; what is signed for one purpose is worthless for others."""

import dataclasses

import pytest

from fedfora.federated.secure_aggregation.crypto import (
    Identity,
    agree,
    new_private_key,
    public_key,
    seal,
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


def test_a_public_key_of_small_order_is_refused():
    with pytest.raises(ValueError, match=r"."):
        agree(new_private_key(), bytes(32), context=b"x")


def test_a_signature_holds_for_site_key_and_purpose_only():
    identity, other = Identity.generate(), Identity.generate()
    key = identity.sign(3, new_private_key(), context=b"round 1")
    verify(key, identity.public_bytes, context=b"round 1")
    changed = [
        (key, other.public_bytes, b"round 1"),
        (key, identity.public_bytes, b"round 2"),
        (dataclasses.replace(key, site=4), identity.public_bytes, b"round 1"),
        (dataclasses.replace(key, public=bytes(32)), identity.public_bytes, b"round 1"),
        (dataclasses.replace(key, signature=bytes(64)), identity.public_bytes, b"round 1"),
        (dataclasses.replace(key, signature=b""), identity.public_bytes, b"round 1"),
    ]
    for forged, pinned, context in changed:
        with pytest.raises(ValueError, match="not signed with that site's identity"):
            verify(forged, pinned, context=context)


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
