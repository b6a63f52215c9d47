"""A site's kit to what would keep it from taking part: keys, gate, disk, data, memory, base.

The base is loaded as the trainer will load it, and let go again; nothing is trained, and nothing
of the rows is shown or sent.
"""

import gc
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import torch
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedfora.data.checks import RowsReport, read_rows
from fedfora.data.encoding import IGNORED, Encoded, encode_examples, prompt_format_of
from fedfora.data.sources import chosen_source
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
from fedfora.deployment.kit import DESCRIPTION, SiteKit
from fedfora.deployment.policy import POLICY, read_policy
from fedfora.deployment.settings import settings_of
from fedfora.federated.settings import FederationSettings
from fedfora.federated.site.identity import read_site_keys
from fedfora.models.fingerprint import fingerprint
from fedfora.models.loading import load_base, load_tokenizer
from fedfora.models.memory_estimate import LIBRARIES_BYTES, MemoryEstimate, free_memory
from fedfora.protection.keys import read_signing_key
from fedfora.training.packing import estimate_step

LOGS_BYTES = 256 * 2**20
ADAPTERS_KEPT = 8  # messages on their way, error feedback, copies while writing
TIMEOUT_S = 10.0
# Flower takes a signature from 5 s in its future to 305 s in its past; the rest is for the way.
MOST_AHEAD_S, MOST_BEHIND_S = 4.0, 290.0
FORBIDDEN = "/v1/control/list-runs"  # what a gate must refuse, and harms nobody where it does not


def check_site(kit: SiteKit, *, own_trainer: bool = False) -> Iterator[CheckResult]:
    """Yield what is found, one at a time, as it is found.

    What the kit does not know, such as the batch size, is as the coordinator planned it when the
    kit was made. With an own Trainer, rows, memory and base are those of its script.
    """
    yield check_versions(kit.made_with)
    yield check_modes(kit.directory, kit.private_files)
    yield _keys(kit)
    yield from check_gate(kit)
    try:
        settings = settings_of({**kit.planned, **kit.settings})
    except ValueError as error:
        yield CheckResult("settings", False, str(error), f"change it in {DESCRIPTION}")
        return
    yield run_check(
        "policy", lambda: _policy(kit, settings), f"change {POLICY}, or do not take part"
    )
    if own_trainer:
        return
    rows, data = _data(settings)
    yield data
    estimate, memory = _memory(settings, rows)
    yield memory
    if estimate is not None:
        yield check_disk(kit.state, LOGS_BYTES + ADAPTERS_KEPT * 4 * estimate.adapter_parameters)
    if memory.ok:
        yield _base(kit, settings)


def _keys(kit: SiteKit) -> CheckResult:
    """Say whether private and public halves belong together, and others know ours."""

    def look() -> str:
        node = load_ssh_private_key(kit.node_key.read_bytes(), None)
        if node.public_key() != load_ssh_public_key(kit.node_public_key.read_bytes()):
            raise ValueError("node.key and node.pub do not belong together")
        own = read_signing_key(kit.signing_key).public_key().public_bytes_raw()
        pinned = read_site_keys(kit.site_keys)
        if kit.index not in pinned:
            raise ValueError("this site is not in sites.json; was it revoked?")
        if pinned[kit.index] != own:
            raise ValueError("the key of this site in sites.json is not that of site.key")
        return f"site {kit.index} of {len(pinned)}"

    return run_check("keys", look, "ask the coordinator for the kit, or sites.json, once more")


def _policy(kit: SiteKit, settings: FederationSettings) -> str:
    """Say what the policy limits, and whether the run that is planned is within it."""
    policy = read_policy(kit.directory)
    policy.check(settings, "describe", {}, answered=0, now=datetime.now())
    limits = {name: value for name, value in vars(policy).items() if value}
    return f"limits {', '.join(limits)}" if limits else f"none: no {POLICY} limits a coordinator"


def _data(settings: FederationSettings) -> tuple[RowsReport | None, CheckResult]:
    try:
        source, data = chosen_source(settings.data.train_file, settings.data, flag="train_file")
        report = read_rows(source, data)
    except (ValueError, OSError) as error:
        remedy = f"train_file (or dataset) under settings in {DESCRIPTION}; --own_trainer leaves "
        remedy += "rows and base to your script, where it calls fedfora.federate"
        return None, CheckResult("data", False, str(error), remedy)
    rows, broken, empty = len(report.examples), len(report.broken), len(report.empty_answers())
    message = (
        f"{rows} rows, {broken} broken, {empty} empty answers, {len(report.duplicates())} twice"
    )
    if broken and not data.skip_bad_rows:
        remedy = f"fedfora check data {source} lists them; or skip_bad_rows: true"
        return report, CheckResult("data", False, message, remedy)
    if not rows:
        return None, CheckResult("data", False, message, f"{source} must hold rows to train on")
    return report, CheckResult("data", True, message)


def _memory(
    settings: FederationSettings, rows: RowsReport | None
) -> tuple[MemoryEstimate | None, CheckResult]:
    """Compare what a training takes with what this machine has left."""
    device = settings.model.device
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and not torch.cuda.is_available():
        remedy = f"device: cpu in {DESCRIPTION}, or a driver that PyTorch finds"
        return None, CheckResult("memory", False, "device is cuda, and there is no GPU", remedy)
    try:
        encoded = _encoded(settings, rows)
        estimate, what = estimate_step(settings.model, settings.adapter, settings.train, encoded)
    except (ValueError, OSError) as error:
        remedy = f"model_name_or_path under settings in {DESCRIPTION}: the directory of the base"
        return None, CheckResult("memory", False, str(error), remedy)
    needed = estimate.total + (0 if on_gpu else LIBRARIES_BYTES)
    free, where = free_memory(device), "free on the GPU" if on_gpu else "available"
    message = f"{needed / 2**30:.1f} GiB for {what}, {free / 2**30:.1f} GiB {where}"
    remedy = "free some, gradient_checkpointing: true, or ask for smaller batches or nf4"
    return estimate, CheckResult("memory", free >= needed, message, remedy)


def _encoded(settings: FederationSettings, rows: RowsReport | None) -> Encoded:
    """Return the rows as they will be trained; where there are none, one as long as allowed."""
    if rows is None or not rows.examples:
        source, target = settings.data.max_source_length, settings.data.max_target_length
        labels = [IGNORED] * source + [0] * target
        return [{"input_ids": [0] * (source + target), "labels": labels}]
    tokenizer = load_tokenizer(settings.model)
    return encode_examples(rows.examples, tokenizer, prompt_format_of(settings.data, tokenizer))


def _base(kit: SiteKit, settings: FederationSettings) -> CheckResult:
    """Load the base, and compare its fingerprint with the one that is asked for."""
    remedy = f"model_name_or_path under settings in {DESCRIPTION}: the directory of the base"
    try:
        base = load_base(settings.model)
        own = fingerprint(base)
    except (ValueError, OSError) as error:
        return CheckResult("base", False, str(error), remedy)
    del base
    gc.collect()
    name, expected = settings.model.model_name_or_path, kit.base_fingerprint
    if expected is None:
        return CheckResult("base", True, f"{name}, fingerprint {own}: all sites must show the same")
    if own != expected:
        message = f"{name} has fingerprint {own}, the federation {expected}"
        return CheckResult("base", False, message, "get the base from where the others have it")
    return CheckResult("base", True, f"{name}, fingerprint {own} as the federation's")


def check_gate(kit: SiteKit) -> list[CheckResult]:
    """Return what a site finds at the gate, by one connection: port, certificate, paths, clock.

    What cannot be asked any more is left out.
    """
    proxy = proxy_to(kit.host)
    results = []
    if proxy:
        results.append(CheckResult("proxy", True, f"{kit.host} is reached through {shown(proxy)}"))
    with closing(_connection(kit, proxy)) as connection:
        for look in (_port, _certificate, _answer):
            results += look(kit, connection)
            if not results[-1].ok:
                break
    return results


def _connection(kit: SiteKit, proxy: str | None) -> HTTPConnection:
    """Return a connection to the gate that takes the way the SuperNode's take; not yet open."""
    if not proxy:
        return HTTPConnection(kit.host, kit.port, timeout=TIMEOUT_S)
    parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    connection = HTTPConnection(str(parts.hostname), parts.port or 80, timeout=TIMEOUT_S)
    login = f"{parts.username}:{parts.password}".encode() if parts.username else b""
    headers = {"Proxy-Authorization": f"Basic {b64encode(login).decode()}"} if login else {}
    connection.set_tunnel(kit.host, kit.port, headers)
    return connection


def _port(kit: SiteKit, connection: HTTPConnection) -> list[CheckResult]:
    where = f"{kit.host} port {kit.port}"
    try:
        connection.connect()
    except socket.gaierror:
        remedy = "ask your network's people for its address, or the coordinator for its name"
        return [CheckResult("port", False, f"no address is known for {kit.host}", remedy)]
    except ConnectionRefusedError:
        remedy = "the coordinator is not running, or a firewall refuses; ask the coordinator"
        return [CheckResult("port", False, f"{where} refuses the connection", remedy)]
    except OSError as error:
        remedy = f"let this machine connect to {where} (TCP, outgoing) through your firewall"
        return [CheckResult("port", False, f"{where} cannot be reached ({error})", remedy)]
    return [CheckResult("port", True, f"{where} answers")]


def _certificate(kit: SiteKit, connection: HTTPConnection) -> list[CheckResult]:
    """Begin TLS as the SuperNode does, which looks for our authority, the name and the dates."""
    try:
        context = ssl.create_default_context(cafile=kit.authority)
    except ssl.SSLError as error:
        message = f"ca.crt is no certificate ({error})"
        return [CheckResult("certificate", False, message, "ask the coordinator for ca.crt again")]
    try:
        if kit.client_certificate.is_file():
            context.load_cert_chain(kit.client_certificate, kit.client_key)
    except ssl.SSLError as error:
        message = f"client.key is not that of client.crt ({error})"
        remedy = "get both from where the keys were made"
        return [CheckResult("certificate", False, message, remedy)]
    try:
        channel = context.wrap_socket(connection.sock, server_hostname=kit.host)
    except ssl.SSLCertVerificationError as error:
        return [_bad_certificate(error)]
    except OSError as error:
        remedy = "is that the coordinator's gate? Ask the coordinator for host and port"
        return [CheckResult("certificate", False, f"no TLS there ({error})", remedy)]
    connection.sock = channel
    certificate = x509.load_der_x509_certificate(channel.getpeercert(binary_form=True) or b"")
    ends = certificate.not_valid_after_utc
    days = (ends - datetime.now(UTC)).days
    message = f"of our authority, for {kit.host}, until {ends:%Y-%m-%d} ({days} days)"
    message += "; tell the coordinator to renew it" if days < SOON_DAYS else ""
    return [CheckResult("certificate", True, message)]


def _bad_certificate(error: ssl.SSLCertVerificationError) -> CheckResult:
    reason = error.verify_message
    if "expired" in reason:
        remedy = "tell the coordinator: fedfora provision SITES.yaml --renew; is your clock right?"
    elif "not yet valid" in reason:
        remedy = "is your clock right?"
    elif "ismatch" in reason:
        remedy = "host in kit.yaml must be the name or address in the coordinator's certificate"
    else:
        remedy = "not our coordinator, or another ca.crt: send nothing, and ask the coordinator"
    return CheckResult("certificate", False, f"refused ({reason})", remedy)


def _answer(kit: SiteKit, connection: HTTPConnection) -> list[CheckResult]:
    """Ask for what nobody may have, and read the coordinator's clock off the refusal."""
    try:
        connection.request("POST", FORBIDDEN, body=b"")
        answer = connection.getresponse()
        answer.read()
    except (OSError, HTTPException) as error:
        return [CheckResult("gate", False, f"no answer ({error})", "ask the coordinator")]
    if answer.status == 400:
        remedy = "ask the coordinator whether this site was revoked, or its keys replaced"
        message = "does not let this site's certificate (client.crt) in"
        return [CheckResult("gate", False, message, remedy)]
    if answer.status != 403:
        remedy = "do not start: without the gate anybody can run code here; tell the coordinator"
        message = f"{FORBIDDEN} is answered with {answer.status} instead of 403"
        return [CheckResult("gate", False, message, remedy)]
    gate = CheckResult("gate", True, "refuses everything but the sites' own paths")
    return [gate, _clock(answer.getheader("Date"))]


def _clock(date: str | None) -> CheckResult:
    """Compare the clocks; a date of HTTP has whole seconds."""
    if date is None:
        return CheckResult("clock", False, "the gate does not tell its time", "ask the coordinator")
    theirs = parsedate_to_datetime(date).timestamp() + 0.5
    ahead = time.time() - theirs
    message = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    limits = f"at most {MOST_AHEAD_S:.0f} s ahead, {MOST_BEHIND_S:.0f} s behind"
    remedy = f"{limits}: let this machine keep its time by NTP"
    return CheckResult("clock", -MOST_BEHIND_S <= ahead <= MOST_AHEAD_S, message, remedy)
