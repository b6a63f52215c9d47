"""Who a site is, and whom it knows: its signing key, and the public keys of all sites.

A real site's administrator names two files and a directory in the node's configuration, which the
coordinator does not see: `signing-key`, the site's own (`fedfora keys` makes one), `site-keys`, a
JSON object from site number to public key in base64, handed out at provisioning, and `site-state`,
where the site remembers which rounds it has answered (`site/memory.py`).

Simulated sites live in one process or on one machine, with nothing between them to defend against.
Their keys come from the run's seed; the protocol runs in full, and hides nothing from the user who
runs the simulation.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from fedfora.config import Scalar
from fedfora.federated.secure_aggregation.crypto import TAKES_PART, Identity
from fedfora.protection.keys import read_signing_key

SIGNING_KEY, SITE_KEYS, SITE_STATE = "signing-key", "site-keys", "site-state"

Pinned = dict[int, bytes]


def open_identity(node_config: Mapping[str, Scalar], *, seed: int) -> tuple[Identity, Pinned]:
    """Return a site's identity and the public ones of all by number; simulated ones by seed.

    Raises:
        ValueError: If only some of the three are named, or a file cannot be read.
    """
    needed = (SIGNING_KEY, SITE_KEYS, SITE_STATE)
    names = [name for name in needed if name in node_config]
    if not names:
        index, count = int(node_config["partition-id"]), int(node_config["num-partitions"])
        return simulated_identity(seed, index), _simulated_pins(seed, count)
    if missing := [name for name in needed if name not in names]:
        raise ValueError(
            f"the node's configuration names {' and '.join(names)}, but not {' and '.join(missing)}"
        )
    private = read_signing_key(Path(str(node_config[SIGNING_KEY])))
    return Identity(private.private_bytes_raw()), read_site_keys(Path(str(node_config[SITE_KEYS])))


def sign_part(node_config: Mapping[str, Scalar], index: int, base: str) -> dict[str, bytes]:
    """Return a site's public key and its signature that it takes part; nothing without a key.

    Raises:
        ValueError: If the key cannot be read.
    """
    if SIGNING_KEY not in node_config:
        return {}
    private = read_signing_key(Path(str(node_config[SIGNING_KEY])))
    identity = Identity(private.private_bytes_raw())
    signature = identity.sign(index, base.encode(), context=TAKES_PART).signature
    return {"public-key": identity.public_bytes, "signature": signature}


def read_site_keys(path: Path) -> Pinned:
    """Return the public identities in a file, by site number.

    Raises:
        ValueError: If the file is not a JSON object of numbers and keys of 32 bytes in base64, or
            two sites have the same key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        keys = {int(site): base64.b64decode(key, validate=True) for site, key in content.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{SITE_KEYS} {path}: not an object of site keys: {error}") from error
    if wrong := [site for site, key in keys.items() if len(key) != 32]:
        raise ValueError(f"{SITE_KEYS} {path}: the keys of sites {wrong} are not 32 bytes")
    if len(set(keys.values())) < len(keys):
        raise ValueError(f"{SITE_KEYS} {path}: two sites have the same key")
    return keys


def simulated_identity(seed: int, index: int) -> Identity:
    """Return the identity of a simulated site."""
    return Identity(hashlib.sha256(f"fedfora simulated site {seed} {index}".encode()).digest())


@lru_cache(maxsize=1)
def _simulated_pins(seed: int, num_sites: int) -> Pinned:
    return {index: simulated_identity(seed, index).public_bytes for index in range(num_sites)}
