"""A site's look at the coordinator's gate: port, certificate, what it lets through, the clock."""

import socket
import ssl
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection

from cryptography import x509

from fedfora.deployment.check_result import CheckResult
from fedfora.deployment.kit import SiteKit

TIMEOUT_S = 10.0
SOON_DAYS = 30
# Flower takes a signature from 5 s in its future to 305 s in its past; the rest is for the way.
MOST_AHEAD_S, MOST_BEHIND_S = 4.0, 290.0
FORBIDDEN = "/v1/control/list-runs"  # what a gate must refuse, and harms nobody where it does not


def check_gate(kit: SiteKit) -> list[CheckResult]:
    """Return what a site finds at the gate; what cannot be asked any more is left out."""
    port = _port(kit)
    if not port.ok:
        return [port]
    certificate, context = _certificate(kit)
    if context is None:
        return [port, certificate]
    return [port, certificate, *_answer(kit, context)]


def _port(kit: SiteKit) -> CheckResult:
    where = f"{kit.host} port {kit.port}"
    try:
        socket.create_connection((kit.host, kit.port), timeout=TIMEOUT_S).close()
    except socket.gaierror:
        remedy = "ask your network's people for its address, or the coordinator for its name"
        return CheckResult("port", False, f"no address is known for {kit.host}", remedy)
    except ConnectionRefusedError:
        remedy = "the coordinator is not running, or a firewall refuses; ask the coordinator"
        return CheckResult("port", False, f"{where} refuses the connection", remedy)
    except OSError as error:
        remedy = f"let this machine connect to {where} (TCP, outgoing) through your firewall"
        return CheckResult("port", False, f"{where} cannot be reached ({error})", remedy)
    return CheckResult("port", True, f"{where} answers")


def _certificate(kit: SiteKit) -> tuple[CheckResult, ssl.SSLContext | None]:
    """Look at the certificate as the SuperNode does: our authority, the name, the dates."""
    try:
        context = ssl.create_default_context(cafile=kit.authority)
    except ssl.SSLError as error:
        remedy = "ask the coordinator for ca.crt once more"
        return CheckResult(
            "certificate", False, f"ca.crt is no certificate ({error})", remedy
        ), None
    try:
        with (
            socket.create_connection((kit.host, kit.port), timeout=TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=kit.host) as connection,
        ):
            shown = connection.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        return _bad_certificate(error), None
    except OSError as error:
        remedy = "is that the coordinator's gate? Ask the coordinator for host and port"
        return CheckResult("certificate", False, f"no TLS there ({error})", remedy), None
    ends = x509.load_der_x509_certificate(shown).not_valid_after_utc
    days = (ends - datetime.now(UTC)).days
    said = f"of our authority, for {kit.host}, until {ends:%Y-%m-%d} ({days} days)"
    if days < SOON_DAYS:
        said += "; tell the coordinator to renew it"
    return CheckResult("certificate", True, said), context


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


def _answer(kit: SiteKit, context: ssl.SSLContext) -> list[CheckResult]:
    """Ask for what nobody may have, and read the coordinator's clock off the refusal."""
    connection = HTTPSConnection(kit.host, kit.port, timeout=TIMEOUT_S, context=context)
    try:
        connection.request("POST", FORBIDDEN, body=b"")
        answer = connection.getresponse()
        answer.read()
    except (OSError, HTTPException) as error:
        return [CheckResult("gate", False, f"no answer ({error})", "ask the coordinator")]
    finally:
        connection.close()
    if answer.status != 403:
        remedy = "do not start: without the gate anybody can run code here; tell the coordinator"
        said = f"{FORBIDDEN} is answered with {answer.status} instead of 403"
        return [CheckResult("gate", False, said, remedy)]
    gate = CheckResult("gate", True, "refuses everything but the sites' own paths")
    return [gate, _clock(answer.getheader("Date"))]


def _clock(date: str | None) -> CheckResult:
    """Compare the clocks; a date of HTTP has whole seconds."""
    if date is None:
        return CheckResult("clock", False, "the gate does not tell its time", "ask the coordinator")
    theirs = parsedate_to_datetime(date).timestamp() + 0.5
    ahead = time.time() - theirs
    said = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if -MOST_BEHIND_S <= ahead <= MOST_AHEAD_S:
        return CheckResult("clock", True, said)
    limits = f"at most {MOST_AHEAD_S:.0f} s ahead, {MOST_BEHIND_S:.0f} s behind"
    return CheckResult("clock", False, said, f"{limits}: let this machine keep its time by NTP")
