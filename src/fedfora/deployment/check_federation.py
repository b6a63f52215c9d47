"""The coordinator's kit to what would keep the federation from running."""

import errno
import socket
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime

import psutil
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_public_key

from fedfora.deployment.check_result import (
    SOON_DAYS,
    CheckResult,
    check_disk,
    check_modes,
    check_versions,
    proxy_to,
    run_check,
    shown,
)
from fedfora.deployment.gate import gate_command
from fedfora.deployment.kit import DIRECTORY, CoordinatorKit
from fedfora.deployment.settings import settings_of
from fedfora.federated.site.identity import read_site_keys

RENEW = "fedfora provision SITES.yaml --renew"
RUN_BYTES = 2**30  # checkpoints, messages, logs


def check_federation(kit: CoordinatorKit) -> Iterator[CheckResult]:
    """Yield what is found, one at a time, as it is found."""
    yield check_versions(kit.made_with)
    yield check_modes(kit.directory, kit.private_files)
    if kit.authority_key.exists():
        yield CheckResult("authority", True, "ca.key is still here; it belongs on no network")
    yield run_check("certificate", lambda: check_certificate(kit), RENEW)
    yield run_check("sites", lambda: _sites(kit), "fedfora provision SITES.yaml once more")
    yield run_check("settings", lambda: _settings(kit), "change sites.yaml and provision once more")
    yield _gate(kit)
    if proxy := proxy_to(kit.host):
        said = f"no connection of this machine to itself goes through {shown(proxy)}"
        yield CheckResult("proxy", True, said)
    yield _port(kit, "port", "", kit.port)
    yield _port(kit, "superlink", "127.0.0.1", kit.superlink_port)
    yield check_disk(kit.state, RUN_BYTES)


def _signed(server: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        server.verify_directly_issued_by(authority)
    except Exception:  # InvalidSignature is no ValueError
        return False
    return True


def check_certificate(kit: CoordinatorKit) -> str:
    """Return until when the gate's certificate holds.

    Raises:
        ValueError: If it does not hold, now or for this host, or has another key.
    """
    trusted = x509.load_pem_x509_certificates(kit.authority.read_bytes())
    server = x509.load_pem_x509_certificate(kit.server_certificate.read_bytes())
    authority = next((each for each in trusted if _signed(server, each)), None)
    if authority is None:
        raise ValueError("server.crt is not signed by ca.crt")
    key = load_pem_private_key(kit.server_key.read_bytes(), None)
    if key.public_key() != server.public_key():
        raise ValueError("server.key is not that of server.crt")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    if kit.host not in (*names.get_values_for_type(x509.DNSName), *addresses):
        raise ValueError(f"server.crt is not for {kit.host}")
    now = datetime.now(UTC)
    for certificate, file in ((authority, "ca.crt"), (server, "server.crt")):
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            raise ValueError(f"{file} holds from {since:%Y-%m-%d} to {until:%Y-%m-%d}, not now")
    days = (server.not_valid_after_utc - now).days
    message = f"for {kit.host}, until {server.not_valid_after_utc:%Y-%m-%d} ({days} days)"
    return message + ("; renew it soon" if days < SOON_DAYS else "")


def _sites(kit: CoordinatorKit) -> str:
    """Return how many sites have keys."""
    pinned = read_site_keys(kit.site_keys)
    if strange := sorted(set(pinned) ^ set(kit.sites.values())):
        raise ValueError(f"sites.json and kit.yaml do not agree on the sites {strange}")
    for name in kit.sites:
        load_ssh_public_key(kit.node(name).read_bytes())
    nobody = {path.stem for path in (kit.directory / "nodes").iterdir()} - set(kit.sites)
    if nobody:
        raise ValueError(f"nodes/ lets in {', '.join(sorted(nobody))}, who is not in kit.yaml")
    return f"{len(kit.sites)} with keys, {len(kit.revoked)} revoked"


def _settings(kit: CoordinatorKit) -> str:
    settings = settings_of(kit.settings)
    return (
        f"{settings.federation.num_rounds} rounds of {settings.federation.local_steps} steps, "
        f"{settings.aggregation.aggregation}"
    )


def _gate(kit: CoordinatorKit) -> CheckResult:
    """Let nginx read its configuration."""
    try:
        command = gate_command(kit)
    except ValueError as error:
        return CheckResult("gate", False, str(error), "install it, and check again")
    kit.state.mkdir(mode=DIRECTORY, exist_ok=True)
    process = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=60)
    if process.returncode != 0:
        remedy = "fedfora provision SITES.yaml writes nginx.conf anew"
        return CheckResult("gate", False, " ".join(process.stderr.split()), remedy)
    return CheckResult("gate", True, "nginx takes nginx.conf")


def _port(kit: CoordinatorKit, what: str, host: str, port: int) -> CheckResult:
    """Say whether a port can be listened on."""
    if _is_running(kit):
        return CheckResult(what, True, f"port {port}: this federation is running")
    try:
        with socket.create_server((host, port)):
            return CheckResult(what, True, f"port {port} is free")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "end what uses it, or take another port in sites.yaml"
            return CheckResult(what, False, f"port {port} is in use", remedy)
        remedy = "ports below 1024 need rights; take a higher one in sites.yaml"
        return CheckResult(what, False, f"port {port} cannot be listened on ({error})", remedy)


def _is_running(kit: CoordinatorKit) -> bool:
    """Say whether this kit's gate is running, by the number that nginx left."""
    try:
        number = int((kit.state / "gate.pid").read_text())
        return "nginx" in psutil.Process(number).name()
    except (OSError, ValueError, psutil.Error):
        return False
