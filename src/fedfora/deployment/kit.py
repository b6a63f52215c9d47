"""A kit: the directory that holds all that a site, or the coordinator, needs to take part.

`kit.yaml` says who it is and is read here; the other files are found by the properties below.
Nobody but the owner can read a kit. `state` is made when the federation runs.
"""

from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, ClassVar

import yaml

from fedfora.deployment.settings import check_federation_flags, check_site_flags
from fedfora.deployment.sites_file import (
    check_name,
    read_address,
    read_fingerprint,
    read_quorum,
)
from fedfora.deployment.yaml_source import YamlSource
from fedfora.files import write_atomically

DESCRIPTION = "kit.yaml"
SITE, COORDINATOR = "site", "coordinator"
PRIVATE, PUBLIC, SCRIPT, DIRECTORY = 0o600, 0o644, 0o755, 0o700  # modes
MAX_SITES = 100_000


class _File:
    """A file of a kit: read as an attribute of the kit, it is the file's path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, kit: "Kit", owner: type) -> Path:
        return kit.directory / self.name


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What the kits of a site and of the coordinator have in common.

    Args:
        directory: Of the kit.
        federation: Its name.
        host: DNS name or address under which sites reach the gate.
        port: Of the gate.
        settings: Of the coordinator, the flags of the whole federation; of a site, its own.
        base_fingerprint: Of the base that every site must have; None if the sites only agree.
        made_with: Package to version where the kit was made.
    """

    directory: Path
    federation: str
    host: str
    port: int
    settings: dict[str, Any] = field(default_factory=dict)
    base_fingerprint: str | None = None
    made_with: dict[str, str] = field(default_factory=dict)

    authority = _File("ca.crt")  # the only authority that sites trust for the gate
    site_keys = _File("sites.json")  # public keys of all sites, by number
    start = _File("start.sh")
    state = _File("state")  # made while it runs: logs, sockets, runs, what must last

    role: ClassVar[str]

    def description(self) -> dict[str, Any]:
        """Return what kit.yaml holds."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        names = ("host", "port", "superlink_port")
        address = {name: values.pop(name) for name in names if name in values}
        del values["directory"]
        plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
        return {"role": self.role, **plain, "coordinator": address, **values}


@dataclass(frozen=True, kw_only=True)
class SiteKit(Kit):
    """What a site needs.

    Args:
        name: Of the site.
        index: Its number in the federation; its seeds follow from it, as in a simulation.
        planned: Flags of the federation when the kit was made; the coordinator's hold.
    """

    name: str
    index: int
    planned: dict[str, Any] = field(default_factory=dict)

    role = SITE
    node_key = _File("node.key")  # by which the SuperNode shows who it is
    node_public_key = _File("node.pub")  # which the coordinator registers
    signing_key = _File("site.key")  # the site's identity in secure aggregation
    public_key = _File("site.pub")
    client_key = _File("client.key")
    client_certificate = _File("client.crt")  # by which the gate knows it; older kits have none

    @property
    def private_files(self) -> list[Path]:
        """Files that only the owner may read."""
        own = [self.client_key] if self.client_certificate.exists() else []
        return [self.node_key, self.signing_key, *own]

    @property
    def files(self) -> list[Path]:
        """All files that must be there."""
        public = [self.authority, self.node_public_key, self.public_key, self.site_keys]
        return [*self.private_files, *public]


@dataclass(frozen=True, kw_only=True)
class CoordinatorKit(Kit):
    """What the coordinator needs.

    Args:
        superlink_port: Of the SuperLink behind the gate, on loopback.
        quorum: Fewest usable updates of a round; None leaves it to the settings.
        sites: Name to number of those that take part.
        revoked: The same of those that were thrown out; their numbers are not given again.
    """

    superlink_port: int
    quorum: int | None = None
    sites: dict[str, int] = field(default_factory=dict)
    revoked: dict[str, int] = field(default_factory=dict)

    role = COORDINATOR
    authority_key = _File("ca.key")  # needed only to make certificates, best kept elsewhere
    server_certificate = _File("server.crt")  # of the gate, and of the SuperLink behind it
    server_key = _File("server.key")
    gate = _File("nginx.conf")
    client_certificates = _File("clients.pem")  # of all sites; missing where one has none

    @property
    def private_files(self) -> list[Path]:
        """Files that only the owner may read; the authority's key only if it is still here."""
        key = self.authority_key
        return [self.server_key, *([key] if key.exists() else [])]

    @property
    def files(self) -> list[Path]:
        """All files that must be there."""
        public = [self.authority, self.server_certificate, self.site_keys, self.gate]
        return [*self.private_files, *public, *(self.node(name) for name in self.sites)]

    @property
    def next_index(self) -> int:
        """The number of the next site that joins."""
        return max([-1, *self.sites.values(), *self.revoked.values()]) + 1

    def client(self, site: str) -> Path:
        """Return the file with the certificate by which the gate knows a site."""
        return self.directory / "nodes" / f"{site}.crt"

    def node(self, site: str) -> Path:
        """Return the file with the public key of a site's SuperNode."""
        return self.directory / "nodes" / f"{site}.pub"


def write_description(kit: SiteKit | CoordinatorKit) -> None:
    """Write the kit's kit.yaml; it appears whole or not at all."""
    known = {key: value for key, value in kit.description().items() if value not in (None, {})}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    write_atomically(kit.directory / DESCRIPTION, text, mode=PUBLIC, durable=True)


def read_kit(directory: str | Path) -> SiteKit | CoordinatorKit:
    """Read a kit, and check that its files are there.

    Raises:
        ValueError: If a file is missing, or kit.yaml is wrong; with file, line and key.
    """
    place = Path(directory).absolute()
    if not (place / DESCRIPTION).is_file():
        raise ValueError(f"--kit {directory}: no kit there ({DESCRIPTION} is missing)")
    document = YamlSource(place / DESCRIPTION)
    role = document.text(("role",))
    if role not in (SITE, COORDINATOR):
        raise document.error(("role",), f"expected {SITE} or {COORDINATOR}, got {role!r}")
    kit = _site(document, place) if role == SITE else _coordinator(document, place)
    for path in kit.files:
        if not path.is_file():
            raise ValueError(f"--kit {directory}: {path.relative_to(place)} is missing")
    return kit


def read_site_kit(directory: str | Path) -> SiteKit:
    """Read the kit of a site.

    Raises:
        ValueError: If it is wrong, or the coordinator's.
    """
    kit = read_kit(directory)
    if not isinstance(kit, SiteKit):
        raise ValueError(f"--kit {directory} is the coordinator's; a site's is needed")
    return kit


def read_coordinator_kit(directory: str | Path) -> CoordinatorKit:
    """Read the kit of the coordinator.

    Raises:
        ValueError: If it is wrong, or a site's.
    """
    kit = read_kit(directory)
    if not isinstance(kit, CoordinatorKit):
        raise ValueError(
            f"--kit {directory} is that of site {kit.name}; the coordinator's is needed"
        )
    return kit


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Write a file of a kit, on the disk and never readable by more than `mode` when it appears."""
    write_atomically(path, content, mode=mode, durable=True)


def _site(document: YamlSource, directory: Path) -> SiteKit:
    needed = ("role", "federation", "name", "index", "coordinator")
    document.check_keys(
        (), needed=needed, allowed=("base_fingerprint", "settings", "planned", "made_with")
    )
    host, port, _ = read_address(document)
    return SiteKit(
        directory=directory,
        federation=check_name(document, ("federation",), document.text(("federation",))),
        name=check_name(document, ("name",), document.text(("name",))),
        index=document.integer(("index",), 0, MAX_SITES),
        host=host,
        port=port,
        settings=check_site_flags(document, ("settings",), None),
        planned=document.mapping(("planned",), empty=True),
        base_fingerprint=read_fingerprint(document),
        made_with=document.mapping(("made_with",), empty=True),
    )


def _coordinator(document: YamlSource, directory: Path) -> CoordinatorKit:
    optional = ("quorum", "base_fingerprint", "settings", "revoked", "made_with")
    needed = ("role", "federation", "coordinator", "sites")
    document.check_keys((), needed=needed, allowed=optional)
    host, port, behind = read_address(document)
    sites = _numbers(document, "sites")
    return CoordinatorKit(
        directory=directory,
        federation=check_name(document, ("federation",), document.text(("federation",))),
        host=host,
        port=port,
        superlink_port=behind,
        quorum=read_quorum(document, len(sites)),
        settings=check_federation_flags(document, ("settings",)),
        sites=sites,
        revoked=_numbers(document, "revoked"),
        base_fingerprint=read_fingerprint(document),
        made_with=document.mapping(("made_with",), empty=True),
    )


def _numbers(document: YamlSource, key: str) -> dict[str, int]:
    names = document.mapping((key,), empty=key == "revoked")
    for name in names:
        check_name(document, (key, name), name)
    return {name: document.integer((key, name), 0, MAX_SITES) for name in names}


# What a kit holds for people: the script that starts it, and a page that says what it does.


def start_script(kit: SiteKit | CoordinatorKit) -> str:
    """Return the script that starts what the kit is for."""
    site = isinstance(kit, SiteKit)
    return template("start.sh.template").substitute(
        what=f"the site {kit.name}" if isinstance(kit, SiteKit) else "the coordinator",
        federation=kit.federation,
        command="site" if site else "coordinator run",
    )


def readme(kit: SiteKit | CoordinatorKit) -> str:
    """Return the kit's page."""
    facts = {"federation": kit.federation, "host": kit.host, "port": kit.port}
    if isinstance(kit, SiteKit):
        return template("site_readme.md").substitute(facts, name=kit.name)
    page = template("coordinator_readme.md")
    return page.substitute(facts, superlink_port=kit.superlink_port)


def template(name: str) -> Template:
    """Return a text of this package, to be filled in."""
    text = files("fedfora.deployment").joinpath(name).read_text(encoding="utf-8")
    return Template(text)
