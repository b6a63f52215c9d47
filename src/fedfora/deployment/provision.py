"""A sites file to kits: the authority, keys, lists of keys; adding late sites, revoking others.

The coordinator's kit is the source of truth: kits of sites may have been handed over and be gone
from here. Keys and certificates that exist are never written over, nor is what a site says about
itself. What is new appears by renaming; the coordinator's kit.yaml is written last.
"""

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedfora.deployment import certificates
from fedfora.deployment.gate import gate_configuration
from fedfora.deployment.kit import (
    DESCRIPTION,
    DIRECTORY,
    PRIVATE,
    PUBLIC,
    SCRIPT,
    CoordinatorKit,
    SiteKit,
    read_coordinator_kit,
    read_site_kit,
    readme,
    start_script,
    write_description,
    write_file,
)
from fedfora.deployment.settings import SITE_FLAGS, own_flags
from fedfora.deployment.sites_file import SitesFile
from fedfora.federated.site.identity import Pinned, read_site_keys
from fedfora.protection.keys import make_signing_key, read_signing_key
from fedfora.reporting.record import environment

COORDINATOR, SITES = "coordinator", "sites"  # where the kits lie in the directory of all


@dataclass
class Provisioned:
    """What was done.

    Args:
        place: Directory of all kits.
        kit: The coordinator's.
        added: Names of new sites.
        revoked: Name of a site that was taken out.
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
    plan: SitesFile,
    output_dir: str | Path,
    *,
    valid_days: int = 365,
    renew: bool = False,
    revoke: str | None = None,
) -> Provisioned:
    """Write the kits of a federation, or bring existing ones up to date with the sites file.

    Args:
        plan: The federation.
        output_dir: Holds, or will hold, `coordinator` and `sites/NAME`.
        valid_days: How long a new server certificate holds.
        renew: Make a new server certificate.
        revoke: A site to take out.

    Raises:
        ValueError: If something is in the way, or the file does not fit the kits that exist.
    """
    directory = Path(output_dir).absolute()
    if (directory / COORDINATOR).exists():
        provisioned = Provisioned(directory, _fitting(plan, directory, revoke))
        _check_way(provisioned, plan, revoke=revoke, renew=renew)
        if revoke is not None:
            _revoke(provisioned, plan, revoke)
        _bring_up_to_date(provisioned, plan)
        if renew:
            _renew(provisioned, valid_days)
        return provisioned
    if revoke is not None or renew:
        raise ValueError(f"--output_dir {output_dir} holds no kits yet")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"--output_dir {output_dir} is not empty, and holds no kits")
    with _appearing(directory) as staging:
        provisioned = Provisioned(staging, _first(plan, staging, valid_days))
        _bring_up_to_date(provisioned, plan)
    return replace(
        provisioned,
        place=directory,
        kit=replace(provisioned.kit, directory=directory / COORDINATOR),
    )


def _first(plan: SitesFile, directory: Path, valid_days: int) -> CoordinatorKit:
    """Write the coordinator's kit with the authority, and as yet no sites."""
    authority = certificates.make_authority(plan.federation)
    server = certificates.make_server(authority, plan.host, valid_days=valid_days)
    kit = CoordinatorKit(
        directory=directory / COORDINATOR,
        federation=plan.federation,
        host=plan.host,
        port=plan.port,
        superlink_port=plan.superlink_port,
    )
    (kit.directory / "nodes").mkdir(parents=True, mode=DIRECTORY)
    kit.directory.chmod(DIRECTORY)
    write_file(kit.authority_key, authority[0], PRIVATE)
    write_file(kit.authority, authority[1], PUBLIC)
    write_file(kit.server_key, server[0], PRIVATE)
    write_file(kit.server_certificate, server[1], PUBLIC)
    _write_keys(kit.site_keys, {})
    return kit


def _fitting(plan: SitesFile, directory: Path, revoke: str | None) -> CoordinatorKit:
    """Return the coordinator's kit that is there.

    Raises:
        ValueError: If it is another federation's, or the sites file leaves out one of its sites.
    """
    kit = read_coordinator_kit(directory / COORDINATOR)
    for name in ("federation", "host", "port"):
        there, wanted = getattr(kit, name), getattr(plan, name)
        if there != wanted:
            raise ValueError(
                f"{plan.path}: {name} is {wanted!r}, but the kits in {directory} say {there!r}; "
                "sites "
                "hold it in their kits: provision anew into another --output_dir"
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
                f"--revoke {name} takes it out"
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
    """Raise where something is missing or in the way, before anything is changed."""
    for name in plan.sites:
        directory = provisioned.place / SITES / name
        if name not in {**provisioned.kit.sites, **provisioned.kit.revoked} and directory.exists():
            raise ValueError(
                f"{directory} is there, but no part of the federation (a provisioning that was "
                "interrupted?); move it away first"
            )
    remaining = (set(plan.sites) | set(provisioned.kit.sites)) - {revoke}
    if plan.quorum is not None and plan.quorum > len(remaining):
        raise ValueError(f"{plan.path}: quorum: {plan.quorum}, but {len(remaining)} sites are left")
    if renew and not provisioned.kit.authority_key.is_file():
        raise ValueError(
            f"--renew needs {provisioned.kit.authority_key}: put it back for the time of it"
        )


def _bring_up_to_date(provisioned: Provisioned, plan: SitesFile) -> None:
    """Make kits for new sites, and write lists and descriptions."""
    added = [
        name
        for name in plan.sites
        if name not in provisioned.kit.sites and name != provisioned.revoked
    ]
    older = list(provisioned.kit.sites)
    for name in added:
        _add(provisioned, plan, name)
    provisioned.kit = replace(
        provisioned.kit,
        superlink_port=plan.superlink_port,
        quorum=plan.quorum,
        settings=plan.settings,
        base_fingerprint=plan.base_fingerprint,
        made_with=_versions(),
    )
    provisioned.added = added
    if added or provisioned.revoked:
        provisioned.need_keys = older
        _share_keys(provisioned)
    write_file(provisioned.kit.gate, gate_configuration(provisioned.kit).encode(), PUBLIC)
    write_file(provisioned.kit.start, start_script(provisioned.kit).encode(), SCRIPT)
    write_file(provisioned.kit.directory / "README.md", readme(provisioned.kit).encode(), PUBLIC)
    write_description(provisioned.kit)
    _note_changes(provisioned, plan, older)


def _add(provisioned: Provisioned, plan: SitesFile, name: str) -> None:
    """Make the kit of a site, and enter its public keys into the coordinator's."""
    kit = SiteKit(
        directory=provisioned.place / SITES / name,
        federation=plan.federation,
        name=name,
        index=provisioned.kit.next_index,
        host=plan.host,
        port=plan.port,
        settings=own_flags(plan.settings, plan.sites[name], quorum=plan.quorum),
        planned={name: value for name, value in plan.settings.items() if name not in SITE_FLAGS},
        base_fingerprint=plan.base_fingerprint,
        made_with=_versions(),
    )
    private, public = certificates.make_node_key()
    with _appearing(kit.directory) as staging:
        new = replace(kit, directory=staging)
        make_signing_key(new.signing_key)
        new.signing_key.with_name("site.key.pub").replace(new.public_key)
        write_file(new.node_key, private, PRIVATE)
        write_file(new.node_public_key, public, PUBLIC)
        write_file(new.authority, provisioned.kit.authority.read_bytes(), PUBLIC)
        keys = read_site_keys(provisioned.kit.site_keys)
        keys[kit.index] = read_signing_key(new.signing_key).public_key().public_bytes_raw()
        _write_keys(new.site_keys, keys)
        write_file(new.start, start_script(new).encode(), SCRIPT)
        write_file(new.directory / "README.md", readme(new).encode(), PUBLIC)
        write_description(new)
    write_file(provisioned.kit.node(name), public, PUBLIC)
    _write_keys(provisioned.kit.site_keys, keys)
    provisioned.kit = replace(provisioned.kit, sites={**provisioned.kit.sites, name: kit.index})


def _revoke(provisioned: Provisioned, plan: SitesFile, name: str) -> None:
    """Take a site's keys out of the coordinator's kit, and delete those of a kit that is here.

    The description comes first and the keys after it: stopped in between, it can be done again.
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
    keys = read_site_keys(kit.site_keys)
    keys.pop(index, None)
    _write_keys(kit.site_keys, keys)
    for file in ("node.key", "node.pub", "site.key", "site.pub", "sites.json"):
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
        "the server certificate is new: a coordinator that runs takes it up; sites need nothing"
    )


def _note_changes(provisioned: Provisioned, plan: SitesFile, older: list[str]) -> None:
    """Say where the sites file and a site's kit differ; the kit is the site's own."""
    for name in older:
        directory = provisioned.place / SITES / name
        if not (directory / DESCRIPTION).is_file() or name not in plan.sites:
            continue
        if read_site_kit(directory).settings != own_flags(
            plan.settings, plan.sites[name], quorum=plan.quorum
        ):
            provisioned.notes.append(
                f"{name}: its flags in {plan.path.name} are not those of its kit, which hold; "
                f"change {directory / DESCRIPTION}"
            )


def _write_keys(path: Path, keys: Pinned) -> None:
    text = {str(index): base64.b64encode(keys[index]).decode() for index in sorted(keys)}
    write_file(path, (json.dumps(text, indent=2) + "\n").encode(), PUBLIC)


def _versions() -> dict[str, str]:
    return dict(environment()["packages"])


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """Give a new directory beside its place; it takes its place if all goes well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        staging.chmod(DIRECTORY)
        yield staging
        os.rename(staging, directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
