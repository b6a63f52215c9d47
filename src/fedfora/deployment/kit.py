"""A kit: the directory that holds everything a site, or the coordinator, needs to take part.

`kit.yaml` says whose it is and is read here; the other files are found by the properties below.
Nobody but the owner can read a kit. `state` is made when the federation runs.
"""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, ClassVar, TypeVar

import yaml

from fedfora.deployment.settings import check_flags
from fedfora.deployment.sites_file import (
    ADDRESS,
    READ,
    Federation,
    Plan,
    check_name,
    read_fields,
    read_name,
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


def _mapping(document: YamlSource, key: str) -> dict[str, Any]:
    return document.mapping((key,), empty=True)


def _own_flags(document: YamlSource, key: str) -> dict[str, Any]:
    return check_flags(document, (key,), None, of_site=True)


def _number(document: YamlSource, *keys: str) -> int:
    return document.integer(keys, 0, MAX_SITES)


def _numbers(document: YamlSource, key: str) -> dict[str, int]:
    names = document.mapping((key,), empty=key == "revoked")
    for name in names:
        check_name(document, (key, name), name)
    return {name: _number(document, key, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Kit(Federation):
    """What the kits of a site and of the coordinator have in common.

    Args:
        directory: Of the kit.
        made_with: Package to version where the kit was made.
    """

    directory: Path
    made_with: dict[str, str] = field(default_factory=dict, metadata={READ: _mapping})

    authority = _File("ca.crt")  # the only authority that sites trust for the gate
    site_keys = _File("sites.json")  # public keys of all sites, by number
    start = _File("start.sh")
    state = _File("state")  # made while it runs: logs, sockets, runs, what must last

    role: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class SiteKit(Kit):
    """What a site needs.

    Args:
        name: Of the site.
        index: Its number in the federation; its seeds follow from it, as in a simulation.
        planned: Flags of the federation when the kit was made; the coordinator's take precedence.
    """

    name: str = field(metadata={READ: read_name})
    index: int = field(metadata={READ: _number})
    planned: dict[str, Any] = field(default_factory=dict, metadata={READ: _mapping})
    settings: dict[str, Any] = field(default_factory=dict, metadata={READ: _own_flags})

    role = SITE
    node_key = _File("node.key")  # by which the SuperNode proves who it is
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
class CoordinatorKit(Kit, Plan):
    """What the coordinator needs.

    Args:
        sites: Name to number of those that take part.
        revoked: The same for sites that were removed; their numbers are not reused.
    """

    sites: dict[str, int] = field(metadata={READ: _numbers})
    revoked: dict[str, int] = field(default_factory=dict, metadata={READ: _numbers})

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


K = TypeVar("K", SiteKit, CoordinatorKit)


def write_description(kit: SiteKit | CoordinatorKit) -> None:
    """Write the kit's kit.yaml; it appears whole or not at all."""
    values = {name: value for name, value in vars(kit).items() if value not in (None, {})}
    address = {name: values.pop(name) for name in ADDRESS if name in values}
    del values["directory"]
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    text = yaml.safe_dump(
        {"role": kit.role, **plain, "coordinator": address, **values},
        sort_keys=False,
        allow_unicode=True,
    )
    write_atomically(kit.directory / DESCRIPTION, text, mode=PUBLIC, durable=True)


def read_kit(directory: str | Path, kind: type[K]) -> K:
    """Read the kit in a directory, of the kind that is needed, and check that its files are there.

    Raises:
        ValueError: If it is of the other kind, a file is missing, or kit.yaml is wrong; with file,
            line and key.
    """
    place = Path(directory).absolute()
    if not (place / DESCRIPTION).is_file():
        raise ValueError(f"--kit {directory}: no kit there ({DESCRIPTION} is missing)")
    document = YamlSource(place / DESCRIPTION)
    role = document.text(("role",))
    if role not in (SITE, COORDINATOR):
        raise document.error(("role",), f"expected {SITE} or {COORDINATOR}, got {role!r}")
    if role != kind.role:
        raise ValueError(f"--kit {directory} is a {role}'s kit; a {kind.role}'s kit is needed")
    kit = kind(directory=place, **read_fields(document, kind, "role"))
    for path in kit.files:
        if not path.is_file():
            raise ValueError(f"--kit {directory}: {path.relative_to(place)} is missing")
    return kit


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Write a file of a kit durably; it appears whole, and never readable by more than `mode`."""
    write_atomically(path, content, mode=mode, durable=True)


def start_script(kit: SiteKit | CoordinatorKit) -> str:
    """Return the script that starts a site or the coordinator."""
    what, command = "the coordinator", "coordinator run"
    if isinstance(kit, SiteKit):
        what, command = f"the site {kit.name}", "site"
    return template("start.sh.template").substitute(vars(kit), what=what, command=command)


def readme(kit: SiteKit | CoordinatorKit) -> str:
    """Return the kit's README."""
    return template(f"{kit.role}_readme.md").substitute(vars(kit))


def template(name: str) -> Template:
    """Return a text of this package, to be filled in."""
    return Template(files("fedfora.deployment").joinpath(name).read_text(encoding="utf-8"))
