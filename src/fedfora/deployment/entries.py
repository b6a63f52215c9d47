"""What sites.yaml and kit.yaml both hold, checked: names, address of the gate, quorum, base."""

import ipaddress
import re

from fedfora.deployment.document import Document

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
DNS_NAME = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9-]+)*"
)
FINGERPRINT = re.compile(r"[0-9a-f]{16}")
PORTS = (1, 65535)


def check_name(document: Document, keys: tuple[str, ...], name: str) -> str:
    """Return a name that can be that of a directory.

    Raises:
        ValueError: If it cannot.
    """
    if not NAME.fullmatch(name):
        raise document.error(
            keys, f"a name has 1 to 63 letters, digits, - and _, not first; got {name!r}"
        )
    return name


def read_address(document: Document) -> tuple[str, int, int]:
    """Return host and port of the gate, and the port of the SuperLink behind it.

    Raises:
        ValueError: If one of them cannot be.
    """
    here = "coordinator"
    document.check_keys((here,), needed=("host", "port"), allowed=("superlink_port",))
    host = document.text((here, "host"))
    if not _is_address(host) and (not DNS_NAME.fullmatch(host) or host.replace(".", "").isdigit()):
        raise document.error(
            (here, "host"), f"expected a DNS name or an address without port, got {host!r}"
        )
    port = document.integer((here, "port"), *PORTS)
    behind = document.integer(
        (here, "superlink_port"), *PORTS, default=port + 1 if port < PORTS[1] else port - 1
    )
    if behind == port:
        raise document.error((here, "superlink_port"), f"{behind} is the gate's port already")
    return host, port, behind


def read_quorum(document: Document, num_sites: int) -> int | None:
    """Return the fewest usable updates of a round.

    Raises:
        ValueError: If it is more than there are sites, or --min_clients says something else.
    """
    if document.content.get("quorum") is None:
        return None
    quorum = document.integer(("quorum",), 1, num_sites)
    asked = document.mapping(("settings",), empty=True).get("min_clients", quorum)
    if asked != quorum:
        raise document.error(("quorum",), f"{quorum}, but settings.min_clients says {asked}")
    return quorum


def read_fingerprint(document: Document) -> str | None:
    """Return the base's fingerprint where one is named.

    Raises:
        ValueError: If it has not the form of one.
    """
    if document.content.get("base_fingerprint") is None:
        return None
    found = document.text(("base_fingerprint",))
    if not FINGERPRINT.fullmatch(found):
        raise document.error(
            ("base_fingerprint",),
            f"expected the 16 hexadecimal digits that `fedfora check site` shows, got {found!r}",
        )
    return found


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
