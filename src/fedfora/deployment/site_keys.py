"""A site's keys, made where they stay, and the request by which a coordinator takes them in.

Three private keys, of which none leaves the site: `node.key` signs what Flower's SuperNode asks
for, `site.key` is the identity in secure aggregation, `client.key` opens the gate's TLS. A request
holds the public halves, signed by `site.key`; one that replaces keys is signed by the earlier
`site.key` too. The gate accepts the certificates in its list alone, each for itself, so no
authority's key is needed to take a site in or to throw it out.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509.oid import NameOID

from fedfora.deployment import certificates
from fedfora.deployment.kit import (
    DESCRIPTION,
    DIRECTORY,
    PRIVATE,
    PUBLIC,
    SiteKit,
    read_kit,
    write_file,
)
from fedfora.deployment.sites_file import NAME
from fedfora.protection.keys import make_signing_key, read_signing_key

SUFFIX = ".request"
NEXT = "next"  # directory of a kit: keys that will replace its own
PURPOSE = b"fedfora: the keys of a site\n"


@dataclass(frozen=True)
class Request:
    """The public halves of a site's keys.

    Args:
        name: Of the site.
        node: Public key of its SuperNode, as OpenSSH writes it.
        site: Public key of its identity, 32 bytes.
        certificate: By which the gate knows it, in PEM.
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
        """Say whether the holder of an earlier identity has signed that these keys replace it."""
        return _verifies(site, self.earlier, self.signed)


def make_keys(kit: SiteKit) -> Request:
    """Make all keys of a site in its directory, and return their public halves."""
    private, node = certificates.make_node_key()
    key, certificate = certificates.make_client(kit.name)
    make_signing_key(kit.signing_key)
    kit.signing_key.with_name("site.key.pub").replace(kit.public_key)
    for path, content in ((kit.node_key, private), (kit.client_key, key)):
        write_file(path, content, PRIVATE)
    for path, content in ((kit.node_public_key, node), (kit.client_certificate, certificate)):
        write_file(path, content, PUBLIC)
    site = read_signing_key(kit.signing_key).public_key().public_bytes_raw()
    return Request(kit.name, node, site, certificate)


def make_request(directory: Path, name: str | None) -> Path:
    """Make a site's keys, or those that are to replace them, and return the request.

    Args:
        directory: Of the kit that is to be, or that is there.
        name: Of a new site.

    Raises:
        ValueError: If the directory or the name is not what it has to be.
    """
    replaced = read_kit(directory, SiteKit) if (directory / DESCRIPTION).exists() else None
    place = directory / NEXT if replaced else directory
    if replaced is not None:
        name = name or replaced.name
        if name != replaced.name:
            raise ValueError(f"--name {name}: the kit in {directory} is that of {replaced.name}")
    if name is None or not NAME.fullmatch(name):
        raise ValueError("--name: the site's, as the coordinator's sites.yaml has it")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{place} is not empty; keys are never written over")
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
        ValueError: Naming the file, if one is no request, or not signed by its own keys.
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
        node = load_ssh_public_key(request.node)
        certificate = x509.load_pem_x509_certificate(request.certificate)
        certificate.verify_directly_issued_by(certificate)
        limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        (common,) = certificate.subject
        names = {request.name, path.stem, common.value}
        whole = isinstance(node, ec.EllipticCurvePublicKey) and node.curve.name == "secp384r1"
        whole = whole and common.oid == NameOID.COMMON_NAME and not limits.ca  # it signs no other
    except Exception as error:  # cryptography's own are no ValueErrors
        raise ValueError(f"{path}: no request of a site: {error}") from None
    if not whole or len(names) != 1 or not NAME.fullmatch(path.stem):
        raise ValueError(
            f"{path}: its keys or its names are not those of a site called {path.stem}"
        )
    if not _verifies(request.site, signature, request.signed):
        raise ValueError(f"{path}: is not signed by its own key; was it changed on its way?")
    return request


def _verifies(key: bytes, signature: bytes, signed: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
    except (InvalidSignature, ValueError):
        return False
    return True


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
