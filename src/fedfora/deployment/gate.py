"""The gate: nginx in front of the SuperLink, so that sites reach what they need and nothing more.

Flower serves the sites' API and the API that starts runs (code on all sites) on one port, without
accounts. The SuperLink therefore listens on loopback, and the gate lets only the sites' paths
through. All of nginx's own files are in the kit's `state`; it needs no privileges.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedfora.deployment.kit import CoordinatorKit, template
from fedfora.deployment.sites_file import address_of

# What Flower's SuperNode requests (flwr.supernode.fleet_http_client, 1.38 to 1.42).
FLEET_PATHS = (
    *("activate-node", "confirm-message-received", "deactivate-node", "get-fab", "get-run"),
    *("pull-messages", "pull-object", "push-messages", "push-object", "register-node"),
    *("send-node-heartbeat", "unregister-node"),
)
GATE_LOG = "gate.log"  # in the kit's state, by nginx
MAX_BODY_MIB = 16  # Flower cuts what it sends into pieces of 5 MB
# A site's connection takes two; strangers' idle ones must fit beside them.
CONNECTIONS = 16_384
# Limits for one site: connections, requests a second, and requests in a burst of messages.
SITE_CONNECTIONS, SITE_REQUESTS, SITE_BURST = 16, 20, 400

MISSING_S = 3600.0  # a site that was not seen for this long is missing
REFUSED_S = 120.0  # a site that restarts is refused for a minute, until its heartbeats are missed
TOLD_S = 3600.0  # the same alarm is not repeated for this long

Finding = tuple[str, bool, dict[str, Any]]  # event, whether it is an alarm, and its facts

# A site's certificate is in the list and vouches only for itself; a stranger gets a 400.
CLIENTS = "ssl_client_certificate clients.pem;\n        ssl_verify_client on;"


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
        clients=CLIENTS if kit.client_certificates.is_file() else "",
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
            "anyone who reaches the port could start runs at every site"
        )
    errors = str(kit.state / "gate-error.log")
    # As root, nginx would run its workers as another user, who cannot enter the kit.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    return [nginx, "-e", errors, "-p", str(kit.directory), "-c", str(kit.gate), *user]


def _listening(host: str) -> str:
    """Return where to listen: loopback stays loopback; a name may belong to a router before us."""
    if (address := address_of(host)) is None:
        return "127.0.0.1:" if host == "localhost" else ""
    written = f"[{host}]:" if address.version == 6 else f"{host}:"
    return written if address.is_loopback else ("[::]:" if address.version == 6 else "")


class GateWatch:
    """Reads the gate's log as it grows: whose kit is held twice, who is refused, who stays away.

    Args:
        log: The log; lines that are in it already are skipped.
        addresses: Site to the address that it last came from.
    """

    def __init__(self, log: Path, addresses: Mapping[str, str]) -> None:
        self.log = log
        self.addresses = dict(addresses)
        self._at = log.stat().st_size if log.is_file() else 0
        self._seen: dict[str, float] = {}
        self._refused: dict[str, tuple[float, str]] = {}  # since when, and last from where
        self._missing: set[str] = set()
        self._told: dict[tuple[str, str, str], float] = {}

    def look(self, sites: Iterable[str], now: float) -> Iterator[Finding]:
        """Yield what is new of the expected `sites`; `now`, in seconds, never goes back."""
        for line in self._new():
            known = line["certificate"] == "SUCCESS"  # otherwise a stranger chose the name
            site = line["site"].removeprefix("CN=") if known else ""
            for event, is_alarm, facts in self._findings(line, site, now):
                key = (event, site, line["address"])
                if not is_alarm or now - self._told.get(key, -TOLD_S) >= TOLD_S:
                    self._told[key] = now
                    yield event, is_alarm, {"site": site, "address": line["address"], **facts}
        for site in sites:
            away = now - self._seen.setdefault(site, now)
            if away > MISSING_S and site not in self._missing:
                self._missing.add(site)
                yield "missing", True, {"site": site, "seconds": round(away)}

    def _findings(self, line: dict[str, Any], site: str, now: float) -> Iterator[Finding]:
        activates, address = line["path"].endswith("/activate-node"), line["address"]
        if line["certificate"].startswith("FAILED"):
            claims = "".join(filter(str.isprintable, line["site"]))[:80]
            yield "refused", True, {"why": line["certificate"][:80], "claims": claims}
        elif activates and line["status"].startswith("4"):
            since, _ = self._refused.get(site, (now, ""))
            self._refused[site] = since, address
            if now - since > REFUSED_S:
                yield "refused", True, {"why": f"status {line['status']} for {now - since:.0f} s"}
        elif site and line["status"].startswith("2"):
            self._seen[site] = now
            refused = self._refused.pop(site, None)
            if refused and not activates:  # somebody else holds its place all the while
                yield "second_holder", True, {"refused": refused[1]}
            if site in self._missing:
                self._missing.discard(site)
                yield "back", False, {}
            if (before := self.addresses.get(site)) != address:
                self.addresses[site] = address
                yield "address", before is not None, {"before": before}

    def _new(self) -> list[dict[str, Any]]:
        """Return the lines since the last call; all of them if the log was started afresh.

        A stranger chooses what is in a path, and a full disk cuts lines: neither may end this.
        """
        if not self.log.is_file():
            return []
        self._at = self._at if self.log.stat().st_size >= self._at else 0
        with self.log.open("rb") as file:
            file.seek(self._at)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._at += len(whole)
        lines = []
        for text in whole.splitlines():
            with suppress(ValueError):
                lines.append(json.loads(text.decode(errors="replace")))
        return lines
