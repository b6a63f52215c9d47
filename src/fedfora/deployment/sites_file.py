"""sites.yaml, which the coordinator's engineer writes, to who takes part and with which flags."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfora.deployment.settings import check_federation_flags, check_site_flags
from fedfora.deployment.yaml_source import YamlSource

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
DNS_NAME = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9-]+)*"
)
FINGERPRINT = re.compile(r"[0-9a-f]{16}")
PORTS = (1, 65535)


@dataclass(frozen=True)
class SitesFile:
    """A federation on several machines, as it is planned.

    Args:
        path: Where it is written.
        federation: Its name.
        host: DNS name or address under which the sites reach the coordinator.
        port: Of the gate there.
        superlink_port: Of the SuperLink behind the gate, on loopback.
        quorum: Fewest usable updates of a round; None leaves it to the settings.
        base_fingerprint: Of the base that every site must have; None if the sites only agree.
        settings: Flags of the whole federation.
        sites: Name to the site's own flags, in the order of the file.
    """

    path: Path
    federation: str
    host: str
    port: int
    superlink_port: int
    quorum: int | None
    base_fingerprint: str | None
    settings: dict[str, Any]
    sites: dict[str, dict[str, Any]]


def read_sites_file(path: str | Path) -> SitesFile:
    """Read and check a sites.yaml.

    Raises:
        ValueError: Naming file, line, key, and what is allowed there.
    """
    document = YamlSource(Path(path))
    document.check_keys(
        (),
        needed=("federation", "coordinator", "sites"),
        allowed=("quorum", "base_fingerprint", "settings"),
    )
    settings = check_federation_flags(document, ("settings",))
    sites = document.mapping(("sites",))
    for name in sites:
        check_name(document, ("sites", name), name)
        check_site_flags(document, ("sites", name), settings)
    _refuse_twins(document, list(sites))
    host, port, superlink_port = read_address(document)
    return SitesFile(
        path=document.path,
        federation=check_name(document, ("federation",), document.text(("federation",))),
        host=host,
        port=port,
        superlink_port=superlink_port,
        quorum=read_quorum(document, len(sites)),
        base_fingerprint=read_fingerprint(document),
        settings=settings,
        sites={name: dict(flags or {}) for name, flags in sites.items()},
    )


def check_name(document: YamlSource, keys: tuple[str, ...], name: str) -> str:
    """Return a name that can be that of a directory.

    Raises:
        ValueError: If it cannot.
    """
    if not NAME.fullmatch(name):
        raise document.error(
            keys, f"a name has 1 to 63 letters, digits, - and _, not first; got {name!r}"
        )
    return name


def read_address(document: YamlSource) -> tuple[str, int, int]:
    """Return host and port of the gate, and the port of the SuperLink behind it.

    Raises:
        ValueError: If one of them cannot be.
    """
    path = "coordinator"
    document.check_keys((path,), needed=("host", "port"), allowed=("superlink_port",))
    host = document.text((path, "host"))
    if not _is_address(host) and (not DNS_NAME.fullmatch(host) or host.replace(".", "").isdigit()):
        raise document.error(
            (path, "host"), f"expected a DNS name or an address without port, got {host!r}"
        )
    port = document.integer((path, "port"), *PORTS)
    behind = document.integer(
        (path, "superlink_port"), *PORTS, default=port + 1 if port < PORTS[1] else port - 1
    )
    if behind == port:
        raise document.error((path, "superlink_port"), f"{behind} is the gate's port already")
    return host, port, behind


def read_quorum(document: YamlSource, num_sites: int) -> int | None:
    """Return the fewest usable updates of a round.

    Raises:
        ValueError: If it is more than there are sites, or --min_clients says something else.
    """
    if document.content.get("quorum") is None:
        return None
    quorum = document.integer(("quorum",), 1, num_sites)
    min_clients = document.mapping(("settings",), empty=True).get("min_clients", quorum)
    if min_clients != quorum:
        raise document.error(("quorum",), f"{quorum}, but settings.min_clients says {min_clients}")
    return quorum


def read_fingerprint(document: YamlSource) -> str | None:
    """Return the base's fingerprint where one is named.

    Raises:
        ValueError: If it has not the form of one.
    """
    if document.content.get("base_fingerprint") is None:
        return None
    fingerprint = document.text(("base_fingerprint",))
    if not FINGERPRINT.fullmatch(fingerprint):
        raise document.error(
            ("base_fingerprint",),
            "expected the 16 hexadecimal digits that `fedfora check site` shows, got "
            f"{fingerprint!r}",
        )
    return fingerprint


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _refuse_twins(document: YamlSource, names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise document.error(("sites", name), f"differs from {other} only in capitals")
