"""The gate, with the real nginx: sites' paths go through, nothing else does."""

import inspect
import json
import os
import re
import select
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_connection, socket

import pytest

from fedfora.deployment import certificates
from fedfora.deployment import gate as gate_module
from fedfora.deployment.gate import (
    CONNECTIONS,
    FLEET_PATHS,
    MAX_BODY_MIB,
    SITE_CONNECTIONS,
    GateWatch,
    gate_command,
    gate_configuration,
)
from fedfora.deployment.kit import CoordinatorKit, read_kit
from fedfora.deployment.provision import provision
from fedfora.deployment.settings import ProvisionArguments
from fedfora.deployment.sites_file import read_sites_file

NOBODY = 65534
PATIENT = b"the notes of a patient"
MUCH = b"much, please"
CUT_OFF = (BrokenPipeError, ConnectionResetError, ssl.SSLError)  # refused before all was sent


def free_port():
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SuperLink(ThreadingHTTPServer):
    """Stands behind the gate, keeps what reached it, and answers with how much that was."""

    def __init__(self, kit):
        self.seen = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen.append((self.path, dict(self.headers), body))
                answer = str(len(body)).encode() if body != MUCH else PATIENT * 700_000
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, *words):
                pass

        super().__init__(("127.0.0.1", kit.superlink_port), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(kit.server_certificate, kit.server_key)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request, client_address):
        pass


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def nginx(kit, account=None):
    """The gate in the foreground, for as long as it is needed."""
    process = subprocess.Popen(
        gate_command(kit) if account is None else gate_command(kit)[:7],
        stderr=subprocess.PIPE,
        user=account,
        group=account,
        extra_groups=None if account is None else [],
        cwd="/",
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                create_connection(("127.0.0.1", kit.port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        assert process.poll() is None, process.stderr.read().decode()
        yield process
    finally:
        process.terminate()
        process.wait(120)
        process.stderr.close()


@pytest.fixture(scope="module")
def kit():
    """A coordinator's kit that an account without any rights can own."""
    place = Path(tempfile.mkdtemp(prefix="gate-"))
    file = place / "sites.yaml"
    file.write_text(
        "federation: clinics\n"
        f"coordinator: {{host: 127.0.0.1, port: {free_port()}, superlink_port: {free_port()}}}\n"
        "sites: {a: {train_file: clinic}, b: {train_file: clinic}}\n"
    )
    kit = provision(read_sites_file(file), ProvisionArguments(output_dir=str(place / "kits"))).kit
    try:
        gate_command(kit)
    except ValueError as error:
        shutil.rmtree(place)
        pytest.skip(str(error))
    kit.state.mkdir(mode=0o700)
    yield kit
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def gate(kit):
    """The gate and what is behind it; run by an account without rights where root runs the tests.

    Its log is not written by anybody else, and nothing is written outside of the kit.
    """
    account = None
    if os.geteuid() == 0:
        account = NOBODY
        place = kit.directory.parent.parent
        for path in (place, *place.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    with serving(SuperLink(kit)) as superlink, nginx(kit, account):
        yield superlink


def context_of(kit, site="a"):
    """What a site connects with: its authority, and its own certificate."""
    here = ssl.create_default_context(cafile=kit.authority)
    own = kit.directory.parent / "sites" / site
    here.load_cert_chain(own / "client.crt", own / "client.key")
    return here


def ask(kit, path, body=b"", method="POST", headers=None):
    """Return status and answer, as a site gets them."""
    connection = HTTPSConnection("127.0.0.1", kit.port, timeout=30, context=context_of(kit))
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_without_nginx_there_is_no_coordinator(kit, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *words, **options: None)
    with pytest.raises(ValueError, match="nginx is not installed"):
        gate_command(kit)


def test_nginx_takes_the_configuration_without_a_word(kit):
    done = subprocess.run([*gate_command(kit), "-t"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "warn" not in done.stderr
    assert "test is successful" in done.stderr


def test_the_paths_are_those_that_flowers_supernode_asks_for():
    from flwr.supernode import fleet_http_client as client

    asked = re.findall(r'path="/v1/fleet/([^"]+)"', inspect.getsource(client))
    assert len(asked) == 12
    assert sorted(asked) == sorted(FLEET_PATHS)


@pytest.mark.parametrize("path", FLEET_PATHS)
def test_the_paths_of_the_sites_reach_the_superlink(kit, gate, path):
    signed = {"flwr-signature": "signed", "flwr-public-key": "known"}
    status, answer = ask(kit, f"/v1/fleet/{path}", PATIENT, headers=signed)
    assert (status, answer) == (200, str(len(PATIENT)).encode())
    seen, headers, body = gate.seen[-1]
    assert (seen, body) == (f"/v1/fleet/{path}", PATIENT)
    assert signed.items() <= headers.items()


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/push-messages",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/start-run",
        "/v1/fleet/get-run/more",
        "/V1/FLEET/get-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/get-run/../../control/start-run",
        "/v1/fleet/get-run%0a",
        "//v1//control//start-run",
        "/api/v1/fleet/get-run",
    ],
)
def test_no_other_path_gets_through(kit, gate, path):
    before = len(gate.seen)
    assert ask(kit, path, b"x")[0] in (400, 403, 404)
    assert len(gate.seen) == before


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run/../../fleet/get-run",
        "/v1//fleet/get-run",
        "/v1/fleet/get%2Drun?x=/v1",
    ],
)
def test_what_gets_through_is_written_as_the_gate_read_it(kit, gate, path):
    """Else the gate could read one path, and the SuperLink another."""
    assert ask(kit, path, b"x")[0] == 200
    assert gate.seen[-1][0] == "/v1/fleet/get-run"


@contextmanager
def connected(kit, address="127.0.0.1"):
    """A connection to the gate with the certificate of a site."""
    here = context_of(kit)
    here.maximum_version = ssl.TLSVersion.TLSv1_2  # 1.3 sends a word of its own
    plain = create_connection(("127.0.0.1", kit.port), 30, (address, 0))
    with here.wrap_socket(plain, server_hostname="127.0.0.1") as channel:
        yield channel


@contextmanager
def unfinished(kit, address, count):
    """Connections of one address, each with a request whose body never comes."""
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx"
    with ExitStack() as stack:
        opened = [stack.enter_context(connected(kit, address)) for _ in range(count)]
        for each in opened:
            each.sendall(head)
        yield opened


def refused(connections, expected):
    """How many of the connections are answered although their request has not ended."""
    give_up, ready = time.monotonic() + 60, []
    while len(ready) < expected and time.monotonic() < give_up:
        ready = select.select(connections, [], [], 0.5)[0]
    ready = select.select(connections, [], [], 0.5)[0]
    return sum(b" 503 " in each.recv(1000) for each in ready)


def test_one_strange_address_cannot_fill_the_gate_and_the_sites_get_through(kit, gate):
    """127.0.0.7 stands for the stranger: of this machine's addresses 127.0.0.1 alone is spared."""
    allowed = SITE_CONNECTIONS * len(kit.sites)
    with unfinished(kit, "127.0.0.7", allowed + 5) as opened:
        assert refused(opened, 5) == 5
        assert ask(kit, "/v1/fleet/get-run", b"x")[0] == 200


def test_who_shows_no_certificate_of_a_site_gets_nothing_and_fills_no_memory(kit, gate, tmp_path):
    """Not even with one that a site has signed, or made by the federation's authority."""
    strangers = {"none": None, "unknown": certificates.make_client("a")}
    authority = kit.authority_key.read_bytes(), kit.authority.read_bytes()
    strangers["the authority's"] = certificates.make_server(authority, "a", valid_days=9)
    own = kit.directory.parent / "sites" / "a"
    signer = (own / "client.key").read_bytes(), (own / "client.crt").read_bytes()
    strangers["a site's"] = certificates.make_server(signer, "b", valid_days=9)
    before = len(gate.seen)
    for who, certified in strangers.items():
        here = ssl.create_default_context(cafile=kit.authority)
        if certified is not None:
            (tmp_path / "key").write_bytes(certified[0])
            (tmp_path / "crt").write_bytes(certified[1])
            here.load_cert_chain(tmp_path / "crt", tmp_path / "key")
        connection = HTTPSConnection("127.0.0.1", kit.port, timeout=30, context=here)
        head = {"Content-Length": str(14 << 20)}
        connection.request("POST", "/v1/fleet/push-object", headers=head)
        assert connection.getresponse().status == 400, who  # before a byte of the body came
        connection.close()
    assert len(gate.seen) == before
    assert ask(kit, "/v1/fleet/get-run", b"x")[0] == 200


def until(condition, seconds=120):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def logged(kit, path):
    """The last line of the gate's log, once it is about a path: nginx answers first."""
    lines = []

    def written():
        text = (kit.state / "gate.log").read_text(errors="replace")
        lines[:] = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        return lines and lines[-1]["path"] == path

    until(written)
    return lines[-1]


def test_the_log_says_which_site_it_was(kit, gate):
    ask(kit, "/v1/fleet/get-run", b"x")
    last = logged(kit, "/v1/fleet/get-run")
    assert (last["site"], last["certificate"]) == ("CN=a", "SUCCESS")


def test_whatever_path_a_stranger_writes_the_log_is_read_on(kit, gate):
    watch = GateWatch(kit.state / "gate.log", {})
    stranger = ssl.create_default_context(cafile=kit.authority)
    for path in ("/%ff", "/%c3%28", "/%22%7d%0a%7b", "/%1b%5b2J"):
        connection = HTTPSConnection("127.0.0.1", kit.port, timeout=30, context=stranger)
        connection.request("POST", path)
        connection.getresponse().read()
        connection.close()
    ask(kit, "/v1/fleet/get-run", b"x")
    seen = []
    until(lambda: seen.extend(facts["site"] for _, _, facts in watch.look([], 0.0)) or seen)
    assert seen == ["a"]


def worker_of(kit):
    master = int((kit.state / "gate.pid").read_text())
    (worker,) = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    return worker


def test_a_worker_may_have_as_many_files_as_its_connections_take(kit, gate):
    """It had 1,024, so that many idle connections shut the gate."""
    worker = worker_of(kit)
    (line,) = re.findall(
        "Max open files +([0-9]+) +([0-9]+)", Path(f"/proc/{worker}/limits").read_text()
    )
    soft, hard = map(int, line)
    assert soft >= min(hard, 2 * CONNECTIONS)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_only_post_gets_through(kit, gate, method):
    before = len(gate.seen)
    assert ask(kit, "/v1/fleet/get-run", b"x", method=method)[0] in (403, 405)
    assert len(gate.seen) == before


def test_a_body_of_the_largest_size_goes_through_and_a_larger_one_does_not(kit, gate):
    size = MAX_BODY_MIB * 2**20
    assert ask(kit, "/v1/fleet/push-object", bytes(size)) == (200, str(size).encode())
    before = len(gate.seen)
    with suppress(*CUT_OFF):
        assert ask(kit, "/v1/fleet/push-object", bytes(size + 1))[0] == 413
    assert len(gate.seen) == before


def test_a_body_that_does_not_say_its_size_is_limited_too(kit, gate):
    def pieces():
        for _ in range(MAX_BODY_MIB + 1):
            yield bytes(2**20)

    before = len(gate.seen)
    with suppress(*CUT_OFF):
        assert ask(kit, "/v1/fleet/push-object", pieces())[0] == 413
    assert len(gate.seen) == before


def test_without_tls_nothing_is_answered(kit, gate):
    before = len(gate.seen)
    connection = HTTPConnection("127.0.0.1", kit.port, timeout=30)
    connection.request("POST", "/v1/fleet/get-run", body=b"x")
    assert connection.getresponse().status == 400
    connection.close()
    assert len(gate.seen) == before


def test_an_old_version_of_tls_is_refused(kit, gate):
    here = context_of(kit)
    here.maximum_version = ssl.TLSVersion.TLSv1_2
    connection = HTTPSConnection("127.0.0.1", kit.port, timeout=30, context=here)
    connection.connect()
    assert connection.sock.version() == "TLSv1.2"
    connection.close()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        here.minimum_version = here.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        connection.connect()


def test_nothing_of_a_body_is_left_on_the_disk(kit, gate):
    ask(kit, "/v1/fleet/push-object", PATIENT * 100_000)
    ask(kit, "/v1/control/start-run?" + PATIENT.decode().replace(" ", "+"), PATIENT)
    last = logged(kit, "/v1/control/start-run")
    assert last["address"] == "127.0.0.1"
    assert (last["method"], last["status"]) == ("POST", "403")
    for path in kit.state.rglob("*"):
        if path.is_file():
            written = path.read_bytes()
            assert PATIENT not in written
            assert PATIENT.replace(b" ", b"+") not in written


def test_nothing_on_its_way_through_the_gate_is_in_a_file(kit, gate):
    """A temporary one has no name, is gone afterwards, and was on the disk all the same."""

    def files():
        opened = map(os.readlink, Path(f"/proc/{worker_of(kit)}/fd").iterdir())
        return [path for path in opened if "/gate-body/" in path or "/gate-proxy/" in path]

    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with connected(kit) as upwards:  # more than a connection holds, so the gate has read it
        upwards.sendall(head % (14 << 20) + PATIENT * 600_000)
        assert files() == []
    with connected(kit) as downwards:
        downwards.sendall(head % len(MUCH) + MUCH)
        assert downwards.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)  # the rest comes, and nobody reads it
        assert files() == []


def test_a_strange_address_gets_no_more_requests_than_all_sites_need(kit, tmp_path, monkeypatch):
    """127.0.0.7 again. Those that pass find no SuperLink, and this machine's own all pass."""
    monkeypatch.setattr(gate_module, "SITE_BURST", 3)
    monkeypatch.setattr(gate_module, "SITE_REQUESTS", 1)
    other = another_kit(tmp_path)
    request = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    with nginx(other):
        for address, refused_some in (("127.0.0.7", True), ("127.0.0.1", False)):
            answers = b""
            with connected(other, address) as connection:
                connection.sendall(request * 30)
                while answers.count(b"HTTP/1.1 ") < 30:
                    answers += connection.recv(1 << 16)
            assert answers.count(b"HTTP/1.1 502") >= 4
            assert (b"HTTP/1.1 503" in answers) is refused_some


def test_the_gate_writes_into_its_kits_state_alone(kit, gate):
    """It listens as an account that may write nowhere else."""
    before = {path.name for path in kit.directory.iterdir()}
    assert before == {
        *(
            "README.md",
            "ca.crt",
            "ca.key",
            "clients.pem",
            "kit.yaml",
            "nginx.conf",
            "nodes",
            "server.crt",
        ),
        *("server.key", "sites.json", "start.sh", "state"),
    }
    assert (kit.state / "gate.pid").is_file()


def another_kit(place):
    file = place / "sites.yaml"
    file.write_text(
        f"federation: clinics\ncoordinator: {{host: 127.0.0.1, port: {free_port()}, "
        f"superlink_port: {free_port()}}}\nsites: {{a: {{}}}}\n"
    )
    kit = provision(read_sites_file(file), ProvisionArguments(output_dir=str(place / "kits"))).kit
    kit.state.mkdir()
    return kit


def test_a_superlink_with_another_certificate_gets_nothing(kit, tmp_path, gate):
    """A program of somebody else that listens behind the gate does not see what sites send."""
    other = another_kit(tmp_path)
    false = SuperLink(replace(kit, superlink_port=other.superlink_port))
    with serving(false), nginx(other):
        assert ask(other, "/v1/fleet/get-run", PATIENT)[0] == 502
    assert false.seen == []


@pytest.mark.parametrize(
    ("host", "listen"),
    [
        ("127.0.0.1", "listen 127.0.0.1:8443 ssl;"),
        ("::1", "listen [::1]:8443 ssl;"),
        ("localhost", "listen 127.0.0.1:8443 ssl;"),
        ("10.1.2.3", "listen 8443 ssl;"),
        ("fed.example.org", "listen 8443 ssl;"),
        ("2001:db8::1", "listen [::]:8443 ssl;"),
    ],
)
def test_loopback_stays_loopback(tmp_path, host, listen):
    file = tmp_path / "sites.yaml"
    file.write_text(
        f"federation: f\ncoordinator: {{host: '{host}', port: 8443}}\nsites: {{a: {{}}}}\n"
    )
    kit = provision(
        read_sites_file(file), ProvisionArguments(output_dir=str(tmp_path / "kits"))
    ).kit
    assert listen in gate_configuration(kit)
    assert read_kit(kit.directory, CoordinatorKit).host == host
