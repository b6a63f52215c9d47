"""The gate: nginx in front of the SuperLink, so that sites reach what is theirs and nothing more.

Flower serves the sites' API and the API that starts runs, that is code on all sites, on one port
and without accounts. The SuperLink therefore listens on loopback, and the gate lets only the paths
of the sites through. All of nginx's own files lie in the kit's `state`; it needs no privileges.
"""

import ipaddress
import os
import shutil

from fedfora.deployment.kit import CoordinatorKit, template

# What a SuperNode of Flower asks for (flwr.supernode.fleet_http_client, 1.38 to 1.42).
FLEET_PATHS = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "register-node",
    "send-node-heartbeat",
    "unregister-node",
)
MAX_BODY_MIB = 16  # Flower cuts what it sends into pieces of 5 MB
CONNECTIONS = (
    16_384  # each of a site's takes two; strangers' idle ones are to find room beside them
)
# Of one site, at most: connections, requests a second, and requests in a burst of messages.
SITE_CONNECTIONS, SITE_REQUESTS, SITE_BURST = 16, 20, 400


def gate_configuration(kit: CoordinatorKit) -> str:
    """Return nginx's configuration for a federation."""
    sites = max(1, len(kit.sites))
    return template("nginx.conf.template").substitute(
        federation=kit.federation,
        connections=CONNECTIONS,
        files=2 * CONNECTIONS,
        connections_each=SITE_CONNECTIONS * sites,
        requests=SITE_REQUESTS * sites,
        burst=SITE_BURST * sites,
        max_body=MAX_BODY_MIB,
        superlink_port=kit.superlink_port,
        listen=f"{_listening(kit.host)}{kit.port}",
        paths="|".join(FLEET_PATHS),
    )


def gate_command(kit: CoordinatorKit) -> list[str]:
    """Return the command that runs the gate in the foreground.

    The kit's `state` must be there before it runs.

    Raises:
        ValueError: If nginx is not installed.
    """
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if nginx is None:
        raise ValueError(
            "nginx is not installed (Debian: apt-get install nginx-light); without the gate, "
            "whoever reaches the port could start runs at every site"
        )
    errors = str(kit.state / "gate-error.log")
    # Root's nginx would let its workers be somebody else, who cannot enter the kit.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    return [nginx, "-e", errors, "-p", str(kit.directory), "-c", str(kit.gate), *user]


def _listening(host: str) -> str:
    """Return where to listen: loopback stays loopback; a name may be that of a router before us."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "127.0.0.1:" if host == "localhost" else ""
    written = f"[{host}]:" if address.version == 6 else f"{host}:"
    return written if address.is_loopback else ("[::]:" if address.version == 6 else "")
