"""sites.yaml, which the coordinator's engineer writes, to who takes part and with which flags.

What a kit's kit.yaml has in common with it is declared and read here too.
"""

import ipaddress
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from fedfora.deployment.settings import check_budget, check_flags, settings_of
from fedfora.deployment.yaml_source import Keys, YamlSource

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
DNS_NAME = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9-]+)*"
)
FINGERPRINT = re.compile(r"[0-9a-f]{32}")
PORTS = (1, 65535)
ADDRESS = ("host", "port", "superlink_port")  # under the key `coordinator` of a file
READ = "read"  # in a field's metadata: takes the file and the key, returns the checked value


def check_name(document: YamlSource, keys: Keys, name: str) -> str:
    """Return a name that can name a directory; raise if it cannot."""
    if not NAME.fullmatch(name):
        raise document.error(
            keys, f"a name has 1 to 63 letters, digits, - and _, not - or _ first; got {name!r}"
        )
    return name


def read_name(document: YamlSource, key: str) -> str:
    """Return the text at a key if it can be the name of a directory."""
    return check_name(document, (key,), document.text((key,)))


def _flags(document: YamlSource, key: str) -> dict[str, Any]:
    return check_flags(document, (key,), {})


def _sites(document: YamlSource, key: str) -> dict[str, dict[str, Any]]:
    settings, names = document.mapping(("settings",), empty=True), document.mapping((key,))
    seen: dict[str, str] = {}
    for name in names:
        check_name(document, (key, name), name)
        if name.lower() == "coordinator":
            raise document.error((key, name), "is the coordinator's name")
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise document.error((key, name), f"differs from {other} only in case")
    sites = {name: check_flags(document, (key, name), settings, of_site=True) for name in names}
    for name, own in sites.items():
        try:
            check_budget(settings_of({**settings, **own}))
        except ValueError as error:
            place = (key, name) if "target_epsilon" in own else ("settings",)
            raise document.error((*place, "target_epsilon"), str(error)) from error
    return sites


def _quorum(document: YamlSource, key: str) -> int | None:
    if document.content.get(key) is None:
        return None
    quorum = document.integer((key,), 1, len(document.mapping(("sites",))))
    min_clients = document.mapping(("settings",), empty=True).get("min_clients", quorum)
    if min_clients != quorum:
        raise document.error((key,), f"{quorum}, but settings.min_clients says {min_clients}")
    return quorum


def _fingerprint(document: YamlSource, key: str) -> str | None:
    if document.content.get(key) is None:
        return None
    fingerprint = document.text((key,))
    if not FINGERPRINT.fullmatch(fingerprint):
        raise document.error(
            (key,),
            "expected the 32 hexadecimal digits that `fedfora check site` shows, got "
            f"{fingerprint!r}",
        )
    return fingerprint


def _address(document: YamlSource) -> tuple[str, int, int]:
    """Return host and port of the gate, and the port of the SuperLink behind it."""
    path = "coordinator"
    document.check_keys((path,), needed=("host", "port"), allowed=("superlink_port",))
    host = document.text((path, "host"))
    is_name = DNS_NAME.fullmatch(host) and not host.replace(".", "").isdigit()
    if address_of(host) is None and not is_name:
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


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return a host as an IP address; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What the sites file and the kits have in common; each field names what reads it from a file.

    Args:
        federation: Its name.
        host: DNS name or address under which the sites reach the coordinator.
        port: Of the gate there.
        settings: Flags of the whole federation; in a site's kit, the site's own.
        base_fingerprint: Of the base that every site must have; None if they only have to agree.
    """

    federation: str = field(metadata={READ: read_name})
    host: str
    port: int
    settings: dict[str, Any] = field(default_factory=dict, metadata={READ: _flags})
    base_fingerprint: str | None = field(default=None, metadata={READ: _fingerprint})


@dataclass(frozen=True, kw_only=True)
class Plan(Federation):
    """What only the coordinator is told.

    Args:
        superlink_port: Of the SuperLink behind the gate, on loopback.
        quorum: Fewest usable updates of a round; None leaves it to the settings.
    """

    superlink_port: int
    quorum: int | None = field(default=None, metadata={READ: _quorum})

    def part(self, kind: type[Federation]) -> dict[str, Any]:
        """Return the fields that it has in common with everything of a kind."""
        return {item.name: getattr(self, item.name) for item in fields(kind)}


@dataclass(frozen=True, kw_only=True)
class SitesFile(Plan):
    """A federation on several machines, as planned.

    Args:
        path: Where it is written.
        sites: Name to the site's own flags, in the order of the file.
    """

    path: Path
    sites: dict[str, dict[str, Any]] = field(metadata={READ: _sites})


def read_sites_file(path: str | Path) -> SitesFile:
    """Read and check a sites.yaml.

    Raises:
        ValueError: Naming file, line, key, and what is allowed there.
    """
    document = YamlSource(Path(path))
    return SitesFile(path=document.path, **read_fields(document, SitesFile))


def read_fields(document: YamlSource, kind: type[Federation], *others: str) -> dict[str, Any]:
    """Return what a file says of the fields of a kind; those without a default must be there.

    Args:
        document: The file.
        kind: A dataclass whose fields name their readers.
        *others: Further keys that must be there.

    Raises:
        ValueError: Naming file, line, key, and what is allowed there.
    """
    readers = {item.name: item for item in fields(kind) if READ in item.metadata}
    needed = [n for n, item in readers.items() if item.default is item.default_factory is MISSING]
    document.check_keys((), needed=(*others, *needed, "coordinator"), allowed=readers)
    values = {name: item.metadata[READ](document, name) for name, item in readers.items()}
    address = zip(ADDRESS, _address(document), strict=True)
    return values | {name: value for name, value in address if name in kind.__dataclass_fields__}
