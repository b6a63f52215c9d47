"""Keys and certificates of a federation: its own authority, the gate's certificate, nodes' keys.

The authority signs one certificate, the gate's; sites accept no other authority, so the machine's
own trust store plays no part. A site shows the gate a certificate of its own, which is in the
gate's list, and signs each request with its node's key, which the coordinator registers (Flower's
SuperNode authentication).

A site may make its keys where they stay: `node.key`, `site.key`, which is its identity in secure
aggregation, and `client.key`, which opens the gate's TLS. Its request holds the public halves,
signed by `site.key`; one that replaces keys is signed by the earlier `site.key` too. The gate
accepts only the certificates in its list, each on its own, so no authority's key is needed to admit
or remove a site.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfora.deployment.kit import (
    DESCRIPTION,
    DIRECTORY,
    PRIVATE,
    PUBLIC,
    SiteKit,
    read_kit,
    write_file,
)
from fedfora.deployment.sites_file import NAME, address_of
from fedfora.protection.keys import make_signing_key, read_signing_key, verifies

AUTHORITY_DAYS = 3650
CLOCKS_DIFFER = timedelta(minutes=5)  # a site whose clock is a little behind must not be shut out
LOOPBACK = ("localhost", "127.0.0.1")  # how the gate and Flower's own processes reach the SuperLink
NO_AUTHORITY = x509.BasicConstraints(ca=False, path_length=None)
USES = (  # all key usages, each of which a certificate must allow or deny
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)

SUFFIX = ".request"
NEXT = "next"  # directory of a kit: keys that will replace its own
PURPOSE = b"fedfora: the keys of a site\n"

Certified = tuple[bytes, bytes]


def make_authority(federation: str) -> Certified:
    """Return key and certificate of a new authority, in PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    name, limits = f"fedfora {federation} authority", x509.BasicConstraints(ca=True, path_length=0)
    builder = _builder(name, key.public_key(), AUTHORITY_DAYS, limits)
    return _pem(key), _signed(builder, key)


def make_server(
    authority: Certified, host: str, *, valid_days: int, now: datetime | None = None
) -> Certified:
    """Return key and certificate of the gate, in PEM.

    Args:
        authority: Key and certificate that sign it.
        host: DNS name or address by which sites reach it; loopback is added.
        valid_days: How long it is valid from `now` on.
        now: Start of its validity; default the present.

    Raises:
        ValueError: If the authority's key does not match its certificate.
    """
    signer = serialization.load_pem_private_key(authority[0], password=None)
    issuer = x509.load_pem_x509_certificate(authority[1])
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != (
        issuer.public_key()
    ):
        raise ValueError("the authority's key does not match its certificate")
    key = ec.generate_private_key(ec.SECP384R1())
    names = [
        x509.IPAddress(address) if (address := address_of(name)) else x509.DNSName(name)
        for name in dict.fromkeys((host, *LOOPBACK))
    ]
    builder = (
        _builder(host[:64], key.public_key(), valid_days, NO_AUTHORITY, issuer.subject, now)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return _pem(key), _signed(builder, signer)


def make_client(name: str) -> Certified:
    """Return key and certificate by which the gate knows a site, in PEM; it is self-signed."""
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(name, key.public_key(), AUTHORITY_DAYS, NO_AUTHORITY)
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
    name: str,
    key: ec.EllipticCurvePublicKey,
    days: int,
    limits: x509.BasicConstraints,
    issuer: x509.Name | None = None,
    now: datetime | None = None,
) -> x509.CertificateBuilder:
    """Return a certificate to be signed; without an issuer it is its own."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = now or datetime.now(UTC)
    allowed = ("key_cert_sign", "crl_sign") if limits.ca else ("digital_signature",)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
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
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass(frozen=True)
class Request:
    """The public halves of a site's keys.

    Args:
        name: The site's name.
        node: Public key of its SuperNode, as OpenSSH writes it.
        site: Public key of its identity, 32 bytes.
        certificate: The one by which the gate knows it, in PEM.
        earlier: Signature by the identity that is replaced; empty for a new site.
    """

    name: str
    node: bytes
    site: bytes
    certificate: bytes
    earlier: bytes = b""

    @property
    def signed(self) -> bytes:
        """What the keys sign."""
        parts = (self.name.encode(), self.node, self.site, self.certificate)
        return PURPOSE + b"".join(hashlib.sha256(part).digest() for part in parts)

    def replaces(self, site: bytes) -> bool:
        """Return whether the holder of an earlier identity signed that these keys replace it."""
        return verifies(site, self.earlier, self.signed)


def make_keys(kit: SiteKit) -> Request:
    """Make all keys of a site in its directory, and return their public halves."""
    private, node = make_node_key()
    key, certificate = make_client(kit.name)
    make_signing_key(kit.signing_key)
    kit.signing_key.with_name("site.key.pub").replace(kit.public_key)
    for path, content in ((kit.node_key, private), (kit.client_key, key)):
        write_file(path, content, PRIVATE)
    for path, content in ((kit.node_public_key, node), (kit.client_certificate, certificate)):
        write_file(path, content, PUBLIC)
    site = read_signing_key(kit.signing_key).public_key().public_bytes_raw()
    return Request(kit.name, node, site, certificate)


def make_request(directory: Path, name: str | None) -> Path:
    """Make a new site's keys, or keys to replace a site's, and return the request.

    Args:
        directory: Of a new kit, or of an existing one.
        name: Of a new site.

    Raises:
        ValueError: If the directory or the name cannot be used.
    """
    replaced = read_kit(directory, SiteKit) if (directory / DESCRIPTION).exists() else None
    place = directory / NEXT if replaced else directory
    if replaced is not None:
        name = name or replaced.name
        if name != replaced.name:
            raise ValueError(f"--name {name}: the kit in {directory} belongs to {replaced.name}")
    if name is None or not NAME.fullmatch(name):
        raise ValueError("--name is missing: the site's name in the coordinator's sites.yaml")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{place} is not empty; keys are never overwritten")
    place.mkdir(parents=True, exist_ok=True, mode=DIRECTORY)
    place.chmod(DIRECTORY)
    kit = SiteKit(directory=place, federation="", name=name, index=0, host="", port=0)
    request = make_keys(kit)
    values = {"name": name, "node": request.node.decode(), "site": _text(request.site)}
    values["certificate"] = request.certificate.decode()
    values["signature"] = _text(read_signing_key(kit.signing_key).sign(request.signed))
    if replaced is not None:
        values["earlier"] = _text(read_signing_key(replaced.signing_key).sign(request.signed))
    path = place / f"{name}{SUFFIX}"
    write_file(path, (json.dumps(values, indent=1) + "\n").encode(), PUBLIC)
    return path


def read_requests(directory: Path) -> dict[str, Request]:
    """Return the requests in a directory by the site's name.

    Raises:
        ValueError: Naming the file, if one is not a request, or not signed by its own keys.
    """
    if not directory.is_dir():
        raise ValueError(f"--requests {directory}: no such directory")
    requests = {path.stem: _read(path) for path in sorted(directory.glob(f"*{SUFFIX}"))}
    if not requests:
        raise ValueError(f"--requests {directory}: no file called NAME{SUFFIX} there")
    return requests


def _read(path: Path) -> Request:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        request = Request(
            values["name"],
            values["node"].encode(),
            base64.b64decode(values["site"], validate=True),
            values["certificate"].encode(),
            base64.b64decode(values.get("earlier", ""), validate=True),
        )
        signature = base64.b64decode(values["signature"], validate=True)
        node = serialization.load_ssh_public_key(request.node)
        certificate = x509.load_pem_x509_certificate(request.certificate)
        certificate.verify_directly_issued_by(certificate)
        limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        (common,) = certificate.subject
        names = {request.name, path.stem, common.value}
        whole = isinstance(node, ec.EllipticCurvePublicKey) and node.curve.name == "secp384r1"
        whole = whole and common.oid == NameOID.COMMON_NAME and not limits.ca  # it signs no other
    except Exception as error:  # cryptography's own are not ValueErrors
        raise ValueError(f"{path}: not a site's request: {error}") from None
    if not whole or len(names) != 1 or not NAME.fullmatch(path.stem):
        raise ValueError(
            f"{path}: its keys or its names do not belong to a site called {path.stem}"
        )
    if not verifies(request.site, signature, request.signed):
        raise ValueError(f"{path}: is not signed by its own key; was it changed in transit?")
    return request


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
