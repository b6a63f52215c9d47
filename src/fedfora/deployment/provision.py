"""A sites file to kits: the authority, keys, lists of keys; adding late sites, revoking others.

The coordinator's kit is the source of truth: sites' kits may have been handed over and deleted
here. Keys and certificates that exist are never overwritten, nor is what a site says about itself.
What is new appears by renaming; the coordinator's kit.yaml is written last.
"""

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedfora.deployment import certificates
from fedfora.deployment.certificates import SUFFIX, Request, make_keys
from fedfora.deployment.gate import gate_configuration
from fedfora.deployment.kit import (
    DESCRIPTION,
    DIRECTORY,
    PRIVATE,
    PUBLIC,
    SCRIPT,
    CoordinatorKit,
    SiteKit,
    read_kit,
    readme,
    start_script,
    write_description,
    write_file,
)
from fedfora.deployment.settings import SITE_FLAGS, ProvisionArguments, own_flags
from fedfora.deployment.sites_file import Federation, Plan, SitesFile
from fedfora.federated.site.identity import Pinned, read_site_keys
from fedfora.protection.keys import public_pem
from fedfora.reporting.record import environment

COORDINATOR, SITES = "coordinator", "sites"  # the kits, in the directory of all


@dataclass
class Provisioned:
    """What was done.

    Args:
        place: Directory of all kits.
        kit: The coordinator's.
        added: Names of new sites.
        revoked: Name of a site that was removed.
        need_keys: Older sites whose list of public keys must be replaced by the new one.
        notes: What the engineer should know.
    """

    place: Path
    kit: CoordinatorKit
    added: list[str] = field(default_factory=list)
    revoked: str | None = None
    need_keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def provision(
    plan: SitesFile, asked: ProvisionArguments, requests: Mapping[str, Request] | None = None
) -> Provisioned:
    """Write the kits of a federation, or bring existing ones up to date with the sites file.

    The output directory holds, or will hold, `coordinator` and `sites/NAME`. `requests` are the
    public keys of sites that made their keys themselves, or made new ones. A new authority is
    trusted beside the present one.

    Raises:
        ValueError: If something is in the way, or the file does not fit the kits that exist.
    """
    directory, requests = Path(asked.output_dir).absolute(), requests or {}
    revoke, renew = asked.revoke, asked.renew
    if unknown := sorted(requests.keys() - plan.sites.keys()):
        raise ValueError(f"{plan.path}: sites.{unknown[0]} is missing, but has a request")
    if (directory / COORDINATOR).exists():
        provisioned = Provisioned(directory, _fitting(plan, directory, revoke, renew))
        _check_way(provisioned, plan, revoke=revoke, renew=renew)
        _check_replaced(provisioned, requests)
        if revoke is not None:
            _revoke(provisioned, plan, revoke)
        if asked.new_authority:
            _change_authority(provisioned)
        _bring_up_to_date(provisioned, plan, requests)
        if renew:
            _renew(provisioned, asked.valid_days)
        return provisioned
    if revoke is not None or renew or asked.new_authority:
        raise ValueError(f"--output_dir {asked.output_dir} holds no kits yet")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"--output_dir {asked.output_dir} is not empty, but holds no kits")
    with _appearing(directory) as staging:
        provisioned = Provisioned(staging, _first(plan, staging, asked.valid_days))
        _bring_up_to_date(provisioned, plan, requests)
    return replace(
        provisioned,
        place=directory,
        kit=replace(provisioned.kit, directory=directory / COORDINATOR),
    )


def _first(plan: SitesFile, directory: Path, valid_days: int) -> CoordinatorKit:
    """Write the coordinator's kit with the authority, as yet without sites."""
    authority = certificates.make_authority(plan.federation)
    server = certificates.make_server(authority, plan.host, valid_days=valid_days)
    kit = CoordinatorKit(directory=directory / COORDINATOR, sites={}, **plan.part(Plan))
    (kit.directory / "nodes").mkdir(parents=True, mode=DIRECTORY)
    kit.directory.chmod(DIRECTORY)
    write_file(kit.authority_key, authority[0], PRIVATE)
    write_file(kit.authority, authority[1], PUBLIC)
    write_file(kit.server_key, server[0], PRIVATE)
    write_file(kit.server_certificate, server[1], PUBLIC)
    _write_keys(kit.site_keys, {})
    return kit


def _fitting(plan: SitesFile, directory: Path, revoke: str | None, renew: bool) -> CoordinatorKit:
    """Return the existing coordinator's kit."""
    kit = read_kit(directory / COORDINATOR, CoordinatorKit)
    for name in ("federation", "host", "port"):
        there, wanted = getattr(kit, name), getattr(plan, name)
        if there != wanted and not (renew and name in ("host", "port")):
            raise ValueError(
                f"{plan.path}: {name} is {wanted!r}, but the kits in {directory} say {there!r}; "
                "--renew changes the coordinator's address; the federation's name cannot change"
            )
    if revoke is not None and revoke not in {**kit.sites, **kit.revoked}:
        known = ", ".join(kit.sites)
        raise ValueError(f"--revoke {revoke}: no such site in {directory} (known: {known})")
    if list(kit.sites) == [revoke]:
        raise ValueError(f"--revoke {revoke}: it is the only site left")
    for name in kit.sites:
        if name not in plan.sites and name != revoke:
            raise ValueError(
                f"{plan.path}: sites.{name} is missing, but it has a kit in {directory}; "
                f"--revoke {name} removes it"
            )
    for name in plan.sites:
        if name in kit.revoked and name != revoke:
            raise ValueError(
                f"{plan.path}: sites.{name} was revoked; delete it there, or let the site come "
                "back under another name"
            )
    return kit


def _check_way(
    provisioned: Provisioned, plan: SitesFile, *, revoke: str | None, renew: bool
) -> None:
    """Raise if something is missing or in the way, before anything is changed."""
    for name in plan.sites:
        directory = provisioned.place / SITES / name
        if name not in {**provisioned.kit.sites, **provisioned.kit.revoked} and directory.exists():
            raise ValueError(
                f"{directory} exists, but is not part of the federation (is it left from an "
                "interrupted provisioning?); move it away first"
            )
    remaining = (set(plan.sites) | set(provisioned.kit.sites)) - {revoke}
    if plan.quorum is not None and plan.quorum > len(remaining):
        raise ValueError(f"{plan.path}: quorum is {plan.quorum}, sites left: {len(remaining)}")
    if renew and not provisioned.kit.authority_key.is_file():
        raise ValueError(
            f"--renew needs {provisioned.kit.authority_key}: put it back while you renew"
        )


def _bring_up_to_date(
    provisioned: Provisioned, plan: SitesFile, requests: Mapping[str, Request]
) -> None:
    """Make kits for new sites, and write lists and descriptions."""
    older = list(provisioned.kit.sites)
    added = [name for name in plan.sites if name not in (*older, provisioned.revoked)]
    replaced = [name for name in older if name in requests]
    for name in replaced:
        _enter(provisioned.kit, name, provisioned.kit.sites[name], requests[name])
        provisioned.notes.append(
            f"{name}: its new keys are registered; the site may now put them into place"
        )
    for name in added:
        _add(provisioned, plan, name, requests.get(name))
    provisioned.kit = replace(
        provisioned.kit, **plan.part(Plan), made_with=environment()["packages"]
    )
    provisioned.added = added
    if added or replaced or provisioned.revoked:
        provisioned.need_keys = older
        _share_keys(provisioned)
    _list_clients(provisioned.kit)
    write_file(provisioned.kit.gate, gate_configuration(provisioned.kit).encode(), PUBLIC)
    write_file(provisioned.kit.start, start_script(provisioned.kit).encode(), SCRIPT)
    write_file(provisioned.kit.directory / "README.md", readme(provisioned.kit).encode(), PUBLIC)
    write_description(provisioned.kit)
    _note_changes(provisioned, plan, older)


def _add(provisioned: Provisioned, plan: SitesFile, name: str, request: Request | None) -> None:
    """Make a site's kit, and enter its public keys into the coordinator's.

    Where the site made its keys itself, the kit holds the public halves.
    """
    settings = own_flags(plan.settings, plan.sites[name], quorum=plan.quorum)
    kit = SiteKit(
        directory=provisioned.place / SITES / name,
        name=name,
        index=provisioned.kit.next_index,
        planned={name: value for name, value in plan.settings.items() if name not in SITE_FLAGS},
        made_with=environment()["packages"],
        **{**plan.part(Federation), "settings": settings},
    )
    with _appearing(kit.directory) as staging:
        new = replace(kit, directory=staging)
        keys = request or make_keys(new)
        if request is not None:
            write_file(new.node_public_key, keys.node, PUBLIC)
            write_file(new.client_certificate, keys.certificate, PUBLIC)
            write_file(new.public_key, public_pem(keys.site), PUBLIC)
        write_file(new.authority, provisioned.kit.authority.read_bytes(), PUBLIC)
        known = {**read_site_keys(provisioned.kit.site_keys), kit.index: keys.site}
        _write_keys(new.site_keys, known)
        write_file(new.start, start_script(new).encode(), SCRIPT)
        write_file(new.directory / "README.md", readme(new).encode(), PUBLIC)
        write_description(new)
    _enter(provisioned.kit, name, kit.index, keys)
    provisioned.kit = replace(provisioned.kit, sites={**provisioned.kit.sites, name: kit.index})


def _enter(kit: CoordinatorKit, name: str, index: int, keys: Request) -> None:
    """Enter a site's public keys into the coordinator's kit."""
    write_file(kit.client(name), keys.certificate, PUBLIC)
    write_file(kit.node(name), keys.node, PUBLIC)
    _write_keys(kit.site_keys, {**read_site_keys(kit.site_keys), index: keys.site})


def _check_replaced(provisioned: Provisioned, requests: Mapping[str, Request]) -> None:
    """Raise if keys would be replaced without their holder's signature."""
    known = read_site_keys(provisioned.kit.site_keys)
    for name, request in requests.items():
        index = provisioned.kit.sites.get(name)
        if index is None or known[index] == request.site or request.replaces(known[index]):
            continue
        raise ValueError(
            f"{name}{SUFFIX} is not signed by {name}'s present key: make the request "
            "in its kit; if that key is lost or stolen, --revoke it and add it by another name"
        )


def _list_clients(kit: CoordinatorKit) -> None:
    """Write the certificates that the gate lets in; none if an older site has none."""
    paths = [kit.client(name) for name in kit.sites]
    if paths and all(path.is_file() for path in paths):
        together = b"".join(path.read_bytes() for path in paths)
        write_file(kit.client_certificates, together, PUBLIC)
    else:
        kit.client_certificates.unlink(missing_ok=True)


def _change_authority(provisioned: Provisioned) -> None:
    """Make a new authority; sites trust it and the present one until the gate's is renewed."""
    kit = provisioned.kit
    key, certificate = certificates.make_authority(kit.federation)
    present, *_ = x509.load_pem_x509_certificates(kit.authority.read_bytes())
    both = certificate + present.public_bytes(Encoding.PEM)
    write_file(kit.authority_key, key, PRIVATE)
    write_file(kit.authority, both, PUBLIC)
    for name in kit.sites:
        directory = provisioned.place / SITES / name
        if (directory / DESCRIPTION).is_file():
            write_file(directory / "ca.crt", both, PUBLIC)
    provisioned.notes.append(
        f"new authority: copy {kit.authority} into each site's kit, restart the sites, then "
        "--renew; if the old one was stolen, delete its certificate, the second in ca.crt"
    )


def _revoke(provisioned: Provisioned, plan: SitesFile, name: str) -> None:
    """Remove a site's keys from the coordinator's kit, and delete those of a kit that is here.

    The description goes first and the keys after it: if interrupted in between, it can be repeated.
    """
    kit = provisioned.kit
    index = kit.revoked[name] if name in kit.revoked else kit.sites[name]
    provisioned.revoked = name
    provisioned.kit = replace(
        kit,
        quorum=plan.quorum,
        sites={site: number for site, number in kit.sites.items() if site != name},
        revoked={**kit.revoked, name: index},
    )
    write_description(provisioned.kit)
    kit.node(name).unlink(missing_ok=True)
    kit.client(name).unlink(missing_ok=True)
    keys = read_site_keys(kit.site_keys)
    keys.pop(index, None)
    _write_keys(kit.site_keys, keys)
    pairs = [
        f"{key}.{part}" for key in ("node", "site", "client") for part in ("key", "pub", "crt")
    ]
    for file in (*pairs, "sites.json"):
        (provisioned.place / SITES / name / file).unlink(missing_ok=True)


def _share_keys(provisioned: Provisioned) -> None:
    """Bring the lists of public keys in all kits that are here up to date."""
    keys = read_site_keys(provisioned.kit.site_keys)
    for name in provisioned.kit.sites:
        directory = provisioned.place / SITES / name
        if (directory / DESCRIPTION).is_file():
            _write_keys(directory / "sites.json", keys)


def _renew(provisioned: Provisioned, valid_days: int) -> None:
    """Replace the server certificate."""
    kit = provisioned.kit
    authority = kit.authority_key.read_bytes(), kit.authority.read_bytes()
    key, certificate = certificates.make_server(authority, kit.host, valid_days=valid_days)
    write_file(kit.server_key, key, PRIVATE)
    write_file(kit.server_certificate, certificate, PUBLIC)
    provisioned.notes.append(
        "new server certificate: a running coordinator picks it up; sites change nothing except "
        f"coordinator: {{host: {kit.host}, port: {kit.port}}} in {DESCRIPTION}, if that differs"
    )


def _note_changes(provisioned: Provisioned, plan: SitesFile, older: list[str]) -> None:
    """Say where the sites file and a site's kit differ; the kit is the site's own."""
    for name in older:
        directory = provisioned.place / SITES / name
        if not (directory / "node.key").is_file() or name not in plan.sites:
            continue  # handed over, or made without the keys
        if read_kit(directory, SiteKit).settings != own_flags(
            plan.settings, plan.sites[name], quorum=plan.quorum
        ):
            provisioned.notes.append(
                f"{name}: its flags in {plan.path.name} differ from those in its kit, which apply; "
                f"change {directory / DESCRIPTION}"
            )


def _write_keys(path: Path, keys: Pinned) -> None:
    text = {str(index): base64.b64encode(keys[index]).decode() for index in sorted(keys)}
    write_file(path, (json.dumps(text, indent=2) + "\n").encode(), PUBLIC)


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """Give a temporary directory; it is moved into place if all goes well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        staging.chmod(DIRECTORY)
        yield staging
        os.rename(staging, directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
