"""What would keep a kit from running: how a check reports, and what the coordinator checks.

A check is a function that returns what it found, or raises a `Fault` with the remedy.
"""

import errno
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_public_key

from fedfora.deployment.gate import gate_command
from fedfora.deployment.kit import DIRECTORY, CoordinatorKit
from fedfora.deployment.settings import settings_of
from fedfora.federated.site.identity import read_site_keys
from fedfora.registry import counted, installed_version
from fedfora.reporting.record import PACKAGES, check_disk_space

PROVISION = "fedfora provision SITES.yaml"
RENEW = f"{PROVISION} --renew"
RUN_BYTES = 2**30  # checkpoints, messages, logs
SOON_DAYS = 30
OTHERS = 0o077  # every right of group and world

# The oldest and the newest version of each that were tried together: in one federation (Flower), or
# on one base with the same fingerprint (the others). docs/log.md says when.
TRIED_TOGETHER = {
    "torch": ("2.13", "2.13"),
    "transformers": ("5.20", "5.24"),
    "peft": ("0.21", "0.21"),
    "bitsandbytes": ("0.50", "0.50"),
    "flwr": ("1.41", "1.42"),
}


class Fault(ValueError):
    """What a check found wrong, with what to do about it."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Args:
        what: What was checked, in one word.
        ok: Whether the kit's owner can take part as far as this goes.
        message: What was found.
        remedy: What to do if it failed.
    """

    what: str
    ok: bool
    message: str
    remedy: str = ""

    def line(self) -> str:
        """Return it as a line of text."""
        line = f"{'ok  ' if self.ok else 'FAIL'} {self.what:12s} {self.message}"
        return line if self.ok else f"{line}: {self.remedy}"


def run_check(what: str, look: Callable[[], str], remedy: str = "") -> CheckResult:
    """Return what `look` returns as passed, or the error that it raises as failed.

    The remedy is for an error that is not a `Fault`.
    """
    try:
        return CheckResult(what, True, look())
    except (ValueError, OSError) as error:
        return CheckResult(what, False, str(error), getattr(error, "remedy", remedy))


def check_modes(directory: Path, private: Iterable[Path]) -> str:
    """Raise unless only the owner can read what is private, and the owner is this account."""
    open_ones = [
        path.name for path in (directory, *private) if stat.S_IMODE(path.stat().st_mode) & OTHERS
    ]
    if open_ones:
        remedy = f"chmod 700 {directory}; chmod 600 {directory}/*.key"
        raise Fault(f"others may read {', '.join(open_ones)}", remedy)
    strange = [path.name for path in private if path.stat().st_uid != os.geteuid()]
    if strange:
        remedy = "run as the account that owns the kit, or chown the kit to this one"
        raise Fault(f"{', '.join(strange)} belongs to another account", remedy)
    return "all there, private ones readable only by you"


def check_versions(made_with: Mapping[str, str]) -> str:
    """Return which versions differ from those that the kit was made with; none excludes a site.

    What a difference may change is checked elsewhere: the base by its fingerprint.
    """
    installed = {name: installed_version(name) for name in PACKAGES}
    message = ", ".join(f"{name} {number or 'missing'}" for name, number in installed.items())
    if installed["flwr"] is None:
        raise Fault(message, 'pip install "fedfora[federated,privacy]"')
    for name, number in made_with.items():
        own = installed.get(name) or "0"
        if _minor(own) != _minor(number):
            oldest, newest = map(_minor, TRIED_TOGETHER.get(name, ("0", "0")))
            tried = all(oldest <= _minor(each) <= newest for each in (own, number))
            message += f"; the federation has {name} {number} "
            message += "(tried together)" if tried else "(not tried together)"
    return message


def _minor(number: str) -> list[int]:
    """Return the first two numbers of a version."""
    return [int("".join(filter(str.isdigit, part)) or 0) for part in number.split(".")[:2]]


def check_disk(state: Path, needed_bytes: int) -> str:
    """Raise unless what will be written fits."""
    try:
        check_disk_space(state, needed_bytes, flag="")
    except ValueError as error:
        raise Fault(str(error), "make room, or move the kit to a larger disk") from error
    return f"room for {needed_bytes / 2**20:,.0f} MiB under {state}"


def check_federation(kit: CoordinatorKit) -> Iterator[CheckResult]:
    """Yield each result about a coordinator's kit as soon as it is there."""
    yield run_check("versions", lambda: check_versions(kit.made_with))
    yield run_check("files", lambda: check_modes(kit.directory, kit.private_files))
    if kit.authority_key.exists():
        yield CheckResult("authority", True, "ca.key is still here; keep it off the network")
    yield run_check("certificate", lambda: check_certificate(kit), RENEW)
    yield run_check("sites", lambda: _sites(kit), f"run {PROVISION} again")
    yield run_check("settings", lambda: _settings(kit), "change sites.yaml and provision again")
    yield run_check("gate", lambda: _gate(kit), "install it, and check again")
    yield run_check("port", lambda: _port(kit, "", kit.port))
    yield run_check("superlink", lambda: _port(kit, "127.0.0.1", kit.superlink_port))
    yield run_check("disk", lambda: check_disk(kit.state, RUN_BYTES))


def check_certificate(kit: CoordinatorKit) -> str:
    """Return until when the gate's certificate is valid.

    Raises:
        ValueError: If it is not valid now or for this host, or does not match its key.
    """
    trusted = x509.load_pem_x509_certificates(kit.authority.read_bytes())
    server = x509.load_pem_x509_certificate(kit.server_certificate.read_bytes())
    authority = next((each for each in trusted if _signed(server, each)), None)
    if authority is None:
        raise ValueError("server.crt is not signed by ca.crt")
    key = load_pem_private_key(kit.server_key.read_bytes(), None)
    if key.public_key() != server.public_key():
        raise ValueError("server.key does not match server.crt")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    if kit.host not in (*names.get_values_for_type(x509.DNSName), *addresses):
        raise ValueError(f"server.crt is not for {kit.host}")
    now = datetime.now(UTC)
    for certificate, file in ((authority, "ca.crt"), (server, "server.crt")):
        since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not since <= now <= until:
            raise ValueError(f"{file} is valid from {since:%Y-%m-%d} to {until:%Y-%m-%d}, not now")
    return f"for {kit.host}, {until_when(server, 'renew it soon')}"


def until_when(certificate: x509.Certificate, request: str) -> str:
    """Return when a certificate expires; if that is soon, with a request."""
    ends = certificate.not_valid_after_utc
    days = (ends - datetime.now(UTC)).days
    return f"until {ends:%Y-%m-%d} ({counted(days, 'day')})" + f"; {request}" * (days < SOON_DAYS)


def _signed(server: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        server.verify_directly_issued_by(authority)
    except Exception:  # InvalidSignature is not a ValueError
        return False
    return True


def _sites(kit: CoordinatorKit) -> str:
    """Return how many sites have keys."""
    pinned = read_site_keys(kit.site_keys)
    if strange := sorted(set(pinned) ^ set(kit.sites.values())):
        raise ValueError(f"sites.json and kit.yaml disagree about the sites {strange}")
    for name in kit.sites:
        load_ssh_public_key(kit.node(name).read_bytes())
    nobody = {path.stem for path in (kit.directory / "nodes").iterdir()} - set(kit.sites)
    if nobody:
        raise ValueError(f"nodes/ lets in {', '.join(sorted(nobody))}, not listed in kit.yaml")
    return f"{len(kit.sites)} with keys, {len(kit.revoked)} revoked"


def _settings(kit: CoordinatorKit) -> str:
    settings = settings_of(kit.settings)
    rounds = counted(settings.federation.num_rounds, "round")
    steps = counted(settings.federation.local_steps, "step")
    return f"{rounds} of {steps}, {settings.aggregation.aggregation}"


def _gate(kit: CoordinatorKit) -> str:
    """Let nginx check its configuration."""
    command = gate_command(kit)
    kit.state.mkdir(mode=DIRECTORY, exist_ok=True)
    process = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=60)
    if process.returncode != 0:
        raise Fault(" ".join(process.stderr.split()), f"{PROVISION} rewrites nginx.conf")
    return "nginx accepts nginx.conf"


def _port(kit: CoordinatorKit, host: str, port: int) -> str:
    """Raise unless a port can be listened on, or this federation does so already."""
    if _is_running(kit):
        return f"port {port}: this federation is running"
    try:
        with socket.create_server((host, port)):
            return f"port {port} is free"
    except OSError as error:
        text = f"cannot listen on port {port} ({error})"
        remedy = "ports below 1024 need privileges; choose a higher one in sites.yaml"
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} is in use"
            remedy = "stop what uses it, or choose another port in sites.yaml"
        raise Fault(text, remedy) from error


def _is_running(kit: CoordinatorKit) -> bool:
    """Return whether this kit's gate is running, by the process id that nginx left."""
    try:
        number = int((kit.state / "gate.pid").read_text())
        return "nginx" in psutil.Process(number).name()
    except (OSError, ValueError, psutil.Error):
        return False
