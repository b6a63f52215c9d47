"""fedfora provision SITES.yaml: a kit for the coordinator and one for each site.

Run again with the same --output_dir, it adds the new sites and leaves the others' keys as they
are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedfora.config import ConfigParser
from fedfora.deployment.settings import ProvisionArguments

if TYPE_CHECKING:
    from fedfora.deployment.provision import Provisioned


def run(argv: Sequence[str]) -> None:
    """Parse, write the kits, and explain what to do with them.

    Raises:
        ValueError: If no file is named, or something in it or in the kits is wrong.
    """
    parser = ConfigParser([ProvisionArguments], description=__doc__, first="sites_file")
    (arguments,) = parser.parse(argv)
    from fedfora.deployment.certificates import read_requests
    from fedfora.deployment.provision import provision
    from fedfora.deployment.sites_file import read_sites_file

    if arguments.sites_file is None:
        raise ValueError("no sites file given: fedfora provision SITES.yaml")
    requests = read_requests(Path(arguments.requests)) if arguments.requests else None
    _print(provision(read_sites_file(arguments.sites_file), arguments, requests))


def _print(provisioned: "Provisioned") -> None:
    kit, sites = provisioned.kit, provisioned.place / "sites"
    print(f"coordinator: {kit.directory} (sites reach it at {kit.host}:{kit.port})")
    for name in provisioned.added:
        print(f"site {name}: {sites / name} (send it over a private channel, then delete it here)")
    if provisioned.revoked is not None:
        print(f"revoked: {provisioned.revoked}; its keys have been removed from every list")
    if provisioned.revoked is not None or (provisioned.added and provisioned.need_keys):
        print("  a coordinator running on this kit notices within seconds; one on another")
        print(f"  machine needs nodes, *.json, *.pem, *.conf and *.yaml from {kit.directory}")
    if provisioned.need_keys:
        names = ", ".join(provisioned.need_keys)
        print(f"new list of keys: {kit.site_keys}")
        print(f"  copy it into the kit of each older site, and restart the site: {names}")
    for note in provisioned.notes:
        print(note)
    if kit.authority_key.exists():
        print(f"keep elsewhere: {kit.authority_key} (needed only for --renew)")
