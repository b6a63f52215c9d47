"""sites.yaml, which the coordinator's engineer writes, to who takes part and with which flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfora.deployment.document import Document
from fedfora.deployment.entries import (
    check_name,
    read_address,
    read_fingerprint,
    read_quorum,
)
from fedfora.deployment.settings import check_federation_flags, check_site_flags


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
    document = Document(Path(path))
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


def _refuse_twins(document: Document, names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise document.error(("sites", name), f"differs from {other} only in capitals")
