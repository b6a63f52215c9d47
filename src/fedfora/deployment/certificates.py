"""Keys and certificates of a federation: its own authority, the gate's certificate, nodes' keys.

The authority signs one certificate, the gate's; sites accept no other authority, so the machine's
own trust store plays no part. A site shows the gate a certificate of its own, which is in the
gate's list, and signs each request with its node's key, which the coordinator registers (Flower's
SuperNode authentication).
"""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfora.deployment.sites_file import address_of

AUTHORITY_DAYS = 3650
CLOCKS_DIFFER = timedelta(minutes=5)  # a site whose clock is a little behind must not be shut out
LOOPBACK = ("localhost", "127.0.0.1")  # how the gate and Flower's own processes reach the SuperLink
NO_AUTHORITY = x509.BasicConstraints(ca=False, path_length=None)
USES = (  # of a key, all that a certificate must say yes or no to
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)

Certified = tuple[bytes, bytes]


def make_authority(federation: str) -> Certified:
    """Return key and certificate of a new authority, in PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _common_name(f"fedfora {federation} authority")
    limits = x509.BasicConstraints(ca=True, path_length=0)
    builder = _builder(name, name, key.public_key(), AUTHORITY_DAYS, limits)
    return _pem(key), _signed(builder, key)


def make_server(
    authority: Certified, host: str, *, valid_days: int, now: datetime | None = None
) -> Certified:
    """Return key and certificate of the gate, in PEM.

    Args:
        authority: Key and certificate that sign it.
        host: DNS name or address by which sites reach it; loopback is added.
        valid_days: How long it holds from `now` on.
        now: Start of its time; default the present.

    Raises:
        ValueError: If the authority's key is not that of its certificate.
    """
    signer = serialization.load_pem_private_key(authority[0], password=None)
    issuer = x509.load_pem_x509_certificate(authority[1])
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != (
        issuer.public_key()
    ):
        raise ValueError("the authority's key is not that of its certificate")
    key = ec.generate_private_key(ec.SECP384R1())
    names = [
        x509.IPAddress(address) if (address := address_of(name)) else x509.DNSName(name)
        for name in dict.fromkeys((host, *LOOPBACK))
    ]
    builder = (
        _builder(
            _common_name(host[:64]), issuer.subject, key.public_key(), valid_days, NO_AUTHORITY, now
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return _pem(key), _signed(builder, signer)


def make_client(name: str) -> Certified:
    """Return key and certificate by which the gate knows a site, in PEM; nobody else signs it."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _common_name(name)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(subject, subject, key.public_key(), AUTHORITY_DAYS, NO_AUTHORITY)
    return _pem(key), _signed(builder.add_extension(usage, critical=False), key)


def make_node_key() -> Certified:
    """Return private and public key of a SuperNode, as OpenSSH writes them (EC P-384)."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public + b"\n"


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    limits: x509.BasicConstraints,
    now: datetime | None = None,
) -> x509.CertificateBuilder:
    start = now or datetime.now(UTC)
    allowed = ("key_cert_sign", "crl_sign") if limits.ca else ("digital_signature",)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCKS_DIFFER)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(limits, critical=True)
        .add_extension(x509.KeyUsage(**{use: use in allowed for use in USES}), critical=True)
    )


def _signed(builder: x509.CertificateBuilder, signer: ec.EllipticCurvePrivateKey) -> bytes:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    certificate = builder.add_extension(identifier, critical=False).sign(signer, hashes.SHA384())
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
