"""Certificates hold for what they say, under the authority that signed them, in their time."""

import asyncio
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.deployment.certificates import make_authority, make_node_key, make_server

AUTHORITY = make_authority("clinics")


def shakes_hands(tmp_path, authority, server, name):
    """Whether OpenSSL, as a site uses it, accepts a server's certificate for a name."""
    (tmp_path / "ca.crt").write_bytes(authority[1])
    (tmp_path / "server.crt").write_bytes(server[1])
    (tmp_path / "server.key").write_bytes(server[0])
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    here = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    here.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default

    async def talk():
        async def answer(reader, writer):
            writer.close()

        listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=there)
        port = listener.sockets[0].getsockname()[1]
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=here, server_hostname=name
            )
            writer.close()
            return "yes"
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        finally:
            listener.close()

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # the server's side of a refusal
    try:
        return loop.run_until_complete(talk())
    finally:
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@pytest.mark.parametrize(
    ("host", "others"),
    [("127.0.0.1", ["localhost"]), ("fed.example.org", ["127.0.0.1", "localhost"])],
)
def test_a_certificate_holds_for_its_host_and_for_loopback(tmp_path, host, others):
    server = make_server(AUTHORITY, host, valid_days=30)
    for name in (host, *others):
        assert shakes_hands(tmp_path, AUTHORITY, server, name) == "yes"
    assert "ismatch" in shakes_hands(tmp_path, AUTHORITY, server, "elsewhere.example.org")


def test_a_certificate_does_not_hold_under_another_authority_of_the_same_name(tmp_path):
    server = make_server(AUTHORITY, "127.0.0.1", valid_days=30)
    other = make_authority("clinics")
    assert shakes_hands(tmp_path, other, server, "127.0.0.1") != "yes"


@pytest.mark.parametrize(("start", "reason"), [(-40, "expired"), (+2, "not yet valid")])
def test_a_certificate_does_not_hold_before_and_after_its_time(tmp_path, start, reason):
    now = datetime.now(UTC) + timedelta(days=start)
    server = make_server(AUTHORITY, "127.0.0.1", valid_days=30, now=now)
    assert reason in shakes_hands(tmp_path, AUTHORITY, server, "127.0.0.1")


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3650))
def test_the_dates_are_the_days_asked_for(days):
    now = datetime(2026, 1, 1, tzinfo=UTC)
    _, pem = make_server(AUTHORITY, "h", valid_days=days, now=now)
    certificate = x509.load_pem_x509_certificate(pem)
    assert certificate.not_valid_after_utc == now + timedelta(days=days)
    assert certificate.not_valid_before_utc < now


def test_a_key_that_is_not_the_authoritys_signs_nothing():
    with pytest.raises(ValueError, match="does not match its certificate"):
        make_server((make_authority("x")[0], AUTHORITY[1]), "h", valid_days=1)


def test_a_servers_certificate_signs_no_other(tmp_path):
    """Whoever steals the gate's key cannot make a second gate of another name."""
    server = make_server(AUTHORITY, "127.0.0.1", valid_days=30)
    below = make_server(server, "evil.example.org", valid_days=30)
    chain = below[0], below[1] + server[1]
    assert shakes_hands(tmp_path, AUTHORITY, chain, "evil.example.org") != "yes"


def test_a_nodes_key_is_what_flower_loads():
    private, public = make_node_key()
    key = load_ssh_private_key(private, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    assert load_ssh_public_key(public) == key.public_key()
