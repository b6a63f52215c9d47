"""A site's kit to what would keep it from taking part: keys, gate, disk, data, memory, base.

The base is loaded as the trainer will load it, and released again; nothing is trained, and nothing
of the rows is shown or sent.
"""

import gc
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import torch
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedfora.data.checks import RowsReport, read_rows
from fedfora.data.encoding import IGNORED, Encoded, encode_examples, prompt_format_of
from fedfora.data.sources import chosen_source
from fedfora.deployment.checks import (
    RENEW,
    CheckResult,
    Fault,
    check_disk,
    check_modes,
    check_versions,
    run_check,
    until_when,
)
from fedfora.deployment.flower_processes import LOOPBACK
from fedfora.deployment.kit import DESCRIPTION, SiteKit
from fedfora.deployment.policy import POLICY, read_policy
from fedfora.deployment.settings import settings_of
from fedfora.federated.settings import FederationSettings
from fedfora.federated.site.identity import read_site_keys
from fedfora.models.fingerprint import fingerprint
from fedfora.models.loading import load_base, load_tokenizer
from fedfora.models.memory_estimate import LIBRARIES_BYTES, free_memory
from fedfora.models.resolve import check_start
from fedfora.models.settings import AdapterArguments
from fedfora.privacy.settings import check_num_rows
from fedfora.protection.keys import read_signing_key
from fedfora.registry import counted
from fedfora.training.packing import estimate_step

LOGS_BYTES = 256 * 2**20
ADAPTERS_KEPT = 8  # messages in transit, error feedback, copies while writing
TIMEOUT_S = 10.0
# Flower takes a signature from 5 s in its future to 305 s in its past; the rest allows for transit.
MOST_AHEAD_S, MOST_BEHIND_S = 4.0, 290.0
FORBIDDEN = "/v1/control/list-runs"  # what a gate must refuse, harmless if it does not

THE_KIT = "ask the coordinator for the kit, or for sites.json, again"
THE_BASE = f"under settings in {DESCRIPTION}, set model_name_or_path to the base's directory"
THE_START = f"under settings in {DESCRIPTION}, set start_adapter to the agreed adapter's directory"
THE_ROWS = (
    f"under settings in {DESCRIPTION}, set train_file (or dataset); --own_trainer leaves rows and "
    "base to your script, where it calls fedfora.federate"
)
# What OpenSSL says about a gate's certificate, to what to do about it.
REFUSED = {
    "expired": f"tell the coordinator: {RENEW}; is your clock right?",
    "not yet valid": "is your clock right?",
    "ismatch": "host in kit.yaml must be the name or address in the coordinator's certificate",
    "": "not our coordinator, or not its ca.crt: send nothing, and ask the coordinator",
}


def check_site(kit: SiteKit, *, own_trainer: bool = False) -> Iterator[CheckResult]:
    """Yield each result as soon as it is there.

    What the kit does not set, such as the batch size, is as the coordinator planned it when the kit
    was made. With a Trainer of its own, rows, memory and base are up to the site's script.
    """
    yield run_check("versions", lambda: check_versions(kit.made_with))
    yield run_check("files", lambda: check_modes(kit.directory, kit.private_files))
    yield run_check("keys", lambda: check_keys(kit), THE_KIT)
    yield from check_gate(kit)
    try:
        settings = settings_of({**kit.planned, **kit.settings})
    except ValueError as error:
        yield CheckResult("settings", False, str(error), f"change it in {DESCRIPTION}")
        return
    not_allowed = f"change {POLICY}, or do not take part"
    yield run_check("policy", lambda: _policy(kit, settings), not_allowed)
    if own_trainer:
        return
    work = Work(settings)
    yield run_check("data", work.check_data, THE_ROWS)
    yield (memory := run_check("memory", work.check_memory, THE_BASE))
    if work.adapter_parameters is not None:
        needed = LOGS_BYTES + ADAPTERS_KEPT * 4 * work.adapter_parameters
        yield run_check("disk", lambda: check_disk(kit.state, needed))
    if settings.adapter.start_adapter is not None:
        yield run_check("start", lambda: _start(settings.adapter), THE_START)
    if memory.ok:
        yield run_check("base", lambda: _base(kit, settings), THE_BASE)


def check_keys(kit: SiteKit) -> str:
    """Raise unless private and public keys match, and the others have this site's."""
    node = load_ssh_private_key(kit.node_key.read_bytes(), None)
    if node.public_key() != load_ssh_public_key(kit.node_public_key.read_bytes()):
        raise ValueError("node.key and node.pub do not match")
    own = read_signing_key(kit.signing_key).public_key().public_bytes_raw()
    pinned = read_site_keys(kit.site_keys)
    if kit.index not in pinned:
        raise ValueError("this site is not in sites.json; was it revoked?")
    if pinned[kit.index] != own:
        raise ValueError("this site's key in sites.json does not match site.key")
    return f"site {kit.index} of {len(pinned)}"


def _policy(kit: SiteKit, settings: FederationSettings) -> str:
    """Say what the policy limits, and raise unless the planned run is within it."""
    policy = read_policy(kit.directory)
    policy.check(settings, "describe", {}, answered=0, now=datetime.now())
    limits = {name: value for name, value in vars(policy).items() if value}
    return f"limits {', '.join(limits)}" if limits else f"none: no {POLICY} limits a coordinator"


class Work:
    """What a site would train on, by its settings; each check leaves what the next one needs."""

    def __init__(self, settings: FederationSettings) -> None:
        self.settings = settings
        self.rows: RowsReport | None = None
        self.adapter_parameters: int | None = None

    def check_data(self) -> str:
        """Read the rows."""
        data = self.settings.data
        source, data = chosen_source(data.train_file, data, flag="train_file")
        self.rows = rows = read_rows(source, data)
        message = (
            f"{counted(len(rows.examples), 'row')}, {len(rows.broken)} broken, "
            f"{counted(len(rows.empty_answers()), 'empty answer')}, {len(rows.duplicates())} twice"
        )
        if rows.broken and not data.skip_bad_rows:
            raise Fault(message, f"fedfora check data {source} lists them; or skip_bad_rows: true")
        if not rows.examples:
            raise Fault(message, f"{source} must hold rows to train on")
        check_num_rows(self.settings.privacy, len(rows.examples))
        return message

    def check_memory(self) -> str:
        """Compare the memory that training takes with what is free on this machine."""
        settings, device = self.settings, self.settings.model.device
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if on_gpu and not torch.cuda.is_available():
            remedy = f"set device: cpu in {DESCRIPTION}, or install a driver that PyTorch finds"
            raise Fault("device is cuda, but there is no GPU", remedy)
        estimate, what = estimate_step(
            settings.model, settings.adapter, settings.train, self._encoded()
        )
        self.adapter_parameters = estimate.adapter_parameters
        needed = estimate.total + (0 if on_gpu else LIBRARIES_BYTES)
        free, where = free_memory(device), "free on the GPU" if on_gpu else "available"
        message = f"{needed / 2**30:.1f} GiB for {what}, {free / 2**30:.1f} GiB {where}"
        if free < needed:
            remedy = "free some, set gradient_checkpointing: true, or get smaller batches or nf4"
            raise Fault(message, remedy)
        return message

    def _encoded(self) -> Encoded:
        """Return the rows as they will be trained; without rows, one as long as allowed."""
        model, data = self.settings.model, self.settings.data
        if self.rows is None or not self.rows.examples:
            labels = [IGNORED] * data.max_source_length + [0] * data.max_target_length
            return [{"input_ids": [0] * len(labels), "labels": labels}]
        tokenizer = load_tokenizer(model)
        return encode_examples(self.rows.examples, tokenizer, prompt_format_of(data, tokenizer))


def _start(adapter: AdapterArguments) -> str:
    """Look at the adapter that a training starts from."""
    check_start(adapter)
    return f"from the adapter {adapter.start_adapter}"


def _base(kit: SiteKit, settings: FederationSettings) -> str:
    """Load the base, and compare its fingerprint with the policy's and the federation's."""
    name, own = settings.model.model_name_or_path, fingerprint(load_base(settings.model))
    gc.collect()
    read_policy(kit.directory).check_base(own)
    expected = kit.base_fingerprint
    if expected is None:
        return f"{name}, fingerprint {own}: all sites must show the same"
    if own != expected:
        message = f"{name} has fingerprint {own}, the federation's base has {expected}"
        raise Fault(message, "get the base from where the other sites got it")
    return f"{name}, fingerprint {own}, the same as the federation's"


def check_gate(kit: SiteKit) -> Iterator[CheckResult]:
    """Yield what a site finds at the gate, over one connection: port, certificate, paths, clock.

    What can no longer be checked is left out.
    """
    proxy = _proxy_to(kit.host)
    if proxy:
        shown = proxy.rpartition("@")[2]  # without its password
        message = f"{kit.host} is reached through the proxy {shown} (https_proxy, no_proxy)"
        yield CheckResult("proxy", True, message)
    gate = _Gate(kit, proxy)
    looks = {"port": gate.port, "certificate": gate.certificate, "gate": gate.paths}
    with closing(gate.connection):
        for what, look in (looks | {"clock": gate.clock}).items():
            yield (result := run_check(what, look))
            if not result.ok:
                return


def _proxy_to(host: str) -> str | None:
    """Return the proxy that the environment names for TLS connections to a host."""
    if host in LOOPBACK.split(",") or proxy_bypass(host):
        return None
    proxies = getproxies_environment()
    return proxies.get("https") or proxies.get("all")


class _Gate:
    """A site's connection to the gate, the way the SuperNode's take; not yet open."""

    def __init__(self, kit: SiteKit, proxy: str | None) -> None:
        self.kit = kit
        self.connection = HTTPConnection(kit.host, kit.port, timeout=TIMEOUT_S)
        self.date: str | None = None  # in the gate's answer
        if proxy:
            parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
            way = HTTPConnection(str(parts.hostname), parts.port or 80, timeout=TIMEOUT_S)
            login = f"{parts.username}:{parts.password}".encode() if parts.username else b""
            headers = {"Proxy-Authorization": f"Basic {b64encode(login).decode()}"} if login else {}
            way.set_tunnel(kit.host, kit.port, headers)
            self.connection = way

    def port(self) -> str:
        """Connect."""
        where = f"{self.kit.host} port {self.kit.port}"
        try:
            self.connection.connect()
        except socket.gaierror as error:
            remedy = "ask your network's administrator for its address, or the coordinator"
            raise Fault(f"no address is known for {self.kit.host}", remedy) from error
        except ConnectionRefusedError as error:
            remedy = "the coordinator is not running, or a firewall refuses; ask the coordinator"
            raise Fault(f"{where} refuses the connection", remedy) from error
        except OSError as error:
            remedy = f"let this machine connect to {where} (TCP, outgoing) through your firewall"
            raise Fault(f"{where} cannot be reached ({error})", remedy) from error
        return f"{where} answers"

    def certificate(self) -> str:
        """Start TLS as the SuperNode does: checks our authority, the name and the dates."""
        kit = self.kit
        fault = "ca.crt is not a certificate"
        try:
            context = ssl.create_default_context(cafile=kit.authority)
            fault = "client.key does not match client.crt"
            if kit.client_certificate.is_file():
                context.load_cert_chain(kit.client_certificate, kit.client_key)
        except ssl.SSLError as error:
            raise Fault(f"{fault} ({error})", THE_KIT) from error
        try:
            channel = context.wrap_socket(self.connection.sock, server_hostname=kit.host)
        except ssl.SSLCertVerificationError as error:
            reason = error.verify_message
            remedy = next(text for words, text in REFUSED.items() if words in reason)
            raise Fault(f"refused ({reason})", remedy) from error
        except OSError as error:
            remedy = "is that the coordinator's gate? Ask the coordinator for host and port"
            raise Fault(f"no TLS there ({error})", remedy) from error
        self.connection.sock = channel
        certificate = x509.load_der_x509_certificate(channel.getpeercert(binary_form=True) or b"")
        until = until_when(certificate, "tell the coordinator to renew it")
        return f"signed by our authority, for {kit.host}, {until}"

    def paths(self) -> str:
        """Request what the gate must refuse to everyone."""
        try:
            self.connection.request("POST", FORBIDDEN, body=b"")
            answer = self.connection.getresponse()
            answer.read()
        except (OSError, HTTPException) as error:
            raise Fault(f"no answer ({error})", "ask the coordinator") from error
        self.date = answer.getheader("Date")
        if answer.status == 400:
            remedy = "ask the coordinator whether this site was revoked, or its keys replaced"
            raise Fault("does not accept this site's certificate (client.crt)", remedy)
        if answer.status != 403:
            remedy = "do not start: anybody could run code here; tell the coordinator"
            raise Fault(f"{FORBIDDEN} is answered with {answer.status} instead of 403", remedy)
        return "refuses everything but the sites' own paths"

    def clock(self) -> str:
        """Compare the clocks; a date of HTTP has whole seconds."""
        if self.date is None:
            raise Fault("the gate's answer has no date", "ask the coordinator")
        theirs = parsedate_to_datetime(self.date).timestamp() + 0.5
        ahead = time.time() - theirs
        message = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
        if not -MOST_BEHIND_S <= ahead <= MOST_AHEAD_S:
            limits = f"at most {MOST_AHEAD_S:.0f} s ahead, {MOST_BEHIND_S:.0f} s behind"
            raise Fault(message, f"{limits}: synchronize this machine's clock by NTP")
        return message
