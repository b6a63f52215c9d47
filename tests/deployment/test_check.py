"""A check names what would keep a site, or the federation, from running, and what to do."""

import json
import select
import shutil
import signal
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import httpx
import psutil
import pytest

from fedfora.cli.main import main
from fedfora.deployment import check_site as site
from fedfora.deployment import checks, coordinator
from fedfora.deployment.certificates import make_authority, make_server
from fedfora.deployment.check_site import FORBIDDEN, Work, check_keys
from fedfora.deployment.checks import Fault, check_disk, check_modes, check_versions, run_check
from fedfora.deployment.kit import CoordinatorKit, SiteKit, read_kit, write_description
from fedfora.deployment.site import children


@pytest.fixture
def kits(provisioned, rows_file):
    """The coordinator's kit and a site's, its rows and base there; its port is not in use."""
    row = {"instruction": "Extract:", "input": "fever", "output": "none"}
    sites = {"a": {"train_file": rows_file([row, {**row, "input": "cough"}])}, "b": {}}
    settings = {"model_name_or_path": "clinic-base", "quantization": "none", "num_rounds": 2}
    done = provisioned(sites=sites, settings=settings)
    return done.kit, read_kit(done.place / "sites" / "a", SiteKit)


@contextmanager
def a_gate(certified, tmp_path, *, status=403, ahead_s=0.0):
    """Something that listens with a certificate, and answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()
            asked.append(self.path)

        def log_message(self, *words):
            pass

    asked = []
    (tmp_path / "gate.key").write_bytes(certified[0])
    (tmp_path / "gate.crt").write_bytes(certified[1])
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *words: None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "gate.crt", tmp_path / "gate.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def authority_of(kit):
    return kit.authority_key.read_bytes(), kit.authority.read_bytes()


def own_certificate(kit):
    return kit.server_key.read_bytes(), kit.server_certificate.read_bytes()


def check_gate(kit):
    return list(site.check_gate(kit))


def found(findings):
    return {finding.what: finding for finding in findings}


def test_a_gate_that_is_right_is_found_right(kits, tmp_path):
    coordinator, kit = kits
    with a_gate(own_certificate(coordinator), tmp_path) as (port, asked):
        seen = check_gate(replace(kit, port=port))
    assert [finding.what for finding in seen] == ["port", "certificate", "gate", "clock"]
    assert all(finding.ok for finding in seen)
    assert "(364 days)" in found(seen)["certificate"].message
    assert asked == [FORBIDDEN]


def test_a_port_that_nobody_listens_on(kits):
    (finding,) = check_gate(kits[1])
    assert not finding.ok
    assert "refuses the connection" in finding.message
    assert "not running" in finding.remedy


def test_a_name_that_has_no_address(kits):
    (finding,) = check_gate(replace(kits[1], host="coordinator.invalid"))
    assert not finding.ok
    assert finding.what == "port"


@pytest.mark.parametrize(
    ("start_days", "reason", "remedy"), [(-9, "expired", "--renew"), (5, "not yet valid", "clock")]
)
def test_a_certificate_out_of_its_time(kits, tmp_path, start_days, reason, remedy):
    coordinator, kit = kits
    start = datetime.now(UTC) + timedelta(days=start_days)
    server = make_server(authority_of(coordinator), "127.0.0.1", valid_days=7, now=start)
    with a_gate(server, tmp_path) as (port, asked):
        seen = found(check_gate(replace(kit, port=port)))
    assert set(seen) == {"port", "certificate"}
    assert reason in seen["certificate"].message
    assert remedy in seen["certificate"].remedy
    assert asked == []


def test_a_certificate_that_ends_soon_is_told(kits, tmp_path):
    coordinator, kit = kits
    server = make_server(authority_of(coordinator), "127.0.0.1", valid_days=7)
    with a_gate(server, tmp_path) as (port, _):
        finding = found(check_gate(replace(kit, port=port)))["certificate"]
    assert finding.ok
    assert "renew" in finding.message


def test_a_certificate_of_somebody_else_is_sent_nothing(kits, tmp_path):
    other = make_server(make_authority("clinics"), "127.0.0.1", valid_days=7)
    with a_gate(other, tmp_path) as (port, asked):
        seen = found(check_gate(replace(kits[1], port=port)))
    assert not seen["certificate"].ok
    assert "send nothing" in seen["certificate"].remedy
    assert asked == []


class Proxy(BaseHTTPRequestHandler):
    """A site's way out: CONNECT, to one port of this machine whatever name was asked for."""

    def do_CONNECT(self):
        self.server.asked.append(self.path)
        with socket.create_connection(("127.0.0.1", self.server.leads_to)) as there:
            self.send_response_only(200)
            self.end_headers()
            ends = {self.connection: there, there: self.connection}
            while True:
                for end in select.select(list(ends), [], [], 10)[0]:
                    if not (piece := end.recv(65536)):
                        return
                    ends[end].sendall(piece)


def test_a_gate_behind_a_proxy_is_looked_at_through_it_and_the_proxy_is_named(
    kits, tmp_path, monkeypatch
):
    """Flower's connections took the environment's proxy, and the check none."""
    coordinator, kit = kits
    server = make_server(authority_of(coordinator), "gate.example", valid_days=90)
    with a_gate(server, tmp_path) as (port, asked), HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.leads_to, proxy.asked = port, []
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{proxy.server_port}")
        seen = check_gate(replace(kit, host="gate.example", port=port))
        proxy.shutdown()
        thread.join()
    assert [finding.what for finding in seen] == ["proxy", "port", "certificate", "gate", "clock"]
    assert all(finding.ok for finding in seen), seen
    assert f"127.0.0.1:{proxy.server_port}" in seen[0].message
    assert "secret" not in seen[0].message
    assert set(proxy.asked) == {f"gate.example:{port}"}
    assert asked == [FORBIDDEN]


def test_no_connection_to_this_machine_takes_a_proxy(kits, monkeypatch):
    """With http_proxy set, `rehearse` and `coordinator run` waited for ever without a word."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intra.example")
    (supernode,) = (child for child in children(kits[1]) if child.name == "SuperNode")
    for name, value in supernode.environment.items():
        monkeypatch.setenv(name, value)
    with httpx.Client() as client:  # as Flower makes its own

        def is_direct(url):
            return client._transport_for_url(httpx.URL(url)) is client._transport

        assert is_direct("http://127.0.0.1:8000")
        assert is_direct("https://localhost:8000")
        assert is_direct("https://intra.example")
        assert not is_direct("https://gate.example")


def test_a_superlink_without_its_gate_is_noticed(kits, tmp_path):
    coordinator, kit = kits
    for status in (200, 401, 404, 415):
        with a_gate(own_certificate(coordinator), tmp_path, status=status) as (port, _):
            seen = found(check_gate(replace(kit, port=port)))
        assert not seen["gate"].ok
        assert "do not start" in seen["gate"].remedy


@pytest.mark.parametrize(("ahead_s", "good"), [(0, True), (200, True), (400, False), (-8, False)])
def test_the_clock_may_be_as_far_off_as_flower_allows(kits, tmp_path, ahead_s, good):
    """The gate ahead is the site behind; Flower allows that more."""
    coordinator, kit = kits
    with a_gate(own_certificate(coordinator), tmp_path, ahead_s=ahead_s) as (port, _):
        finding = found(check_gate(replace(kit, port=port)))["clock"]
    assert finding.ok is good
    assert good or "NTP" in finding.remedy


def test_the_clocks_limits_are_within_flowers():
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    from fedfora.deployment.check_site import MOST_AHEAD_S, MOST_BEHIND_S

    assert MOST_AHEAD_S < SYSTEM_TIME_TOLERANCE
    assert MOST_BEHIND_S < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


def test_a_site_that_is_ready_passes_and_a_fault_is_said_with_its_remedy(kits, tmp_path, capsys):
    coordinator, kit = kits
    with a_gate(own_certificate(coordinator), tmp_path) as (port, _):
        write_description(replace(kit, port=port))
        assert main(["check", "site", "--kit", str(kit.directory)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"site {kit.name} of {kit.federation}\n")
        assert out.count("ok ") == len(out.splitlines()) - 1 == 12
        assert "2 rows, 0 broken" in out
        fingerprint = out.split("fingerprint ")[1][:32]
        write_description(replace(kit, port=port, base_fingerprint=fingerprint))
        assert main(["check", "site", "--kit", str(kit.directory)]) == 0
        assert f"fingerprint {fingerprint}, the same as the federation's" in capsys.readouterr().out
        (kit.directory / "policy.yaml").write_text(f"base: [{'f' * 32}]\n")
        assert main(["check", "site", "--kit", str(kit.directory)]) == 2
        assert f"base: {fingerprint} is not among {'f' * 32}" in capsys.readouterr().out
        (kit.directory / "policy.yaml").unlink()
        write_description(replace(kit, port=port, base_fingerprint="0" * 32))
        kit.node_key.chmod(0o644)
        assert main(["check", "site", "--kit", str(kit.directory)]) == 2
    captured = capsys.readouterr()
    failed = [line for line in captured.out.splitlines() if line.startswith("FAIL")]
    assert ["files" in failed[0], "base" in failed[1], len(failed)] == [True, True, 2]
    assert "chmod 600" in failed[0]
    assert f"the federation's base has {'0' * 32}" in failed[1]
    assert "2 of 12 checks failed" in captured.err


def test_paths_of_a_kit_start_at_the_kit_wherever_it_is_checked_from(kits, rows_file, capsys):
    kit = kits[1]
    shutil.copy(rows_file([{"input": "x", "output": "y"}], "own.json"), kit.directory / "own.json")
    settings = {"train_file": "own.json", "start_adapter": "not-there"}
    write_description(replace(kit, settings={**kit.settings, **settings}))
    main(["check", "site", "--kit", str(kit.directory)])
    out = capsys.readouterr().out
    assert "ok   data         1 row, 0 broken" in out
    (start,) = (line for line in out.splitlines() if line.startswith("FAIL start"))
    assert "not-there" in start
    assert "set start_adapter to" in start


def test_nothing_of_a_row_is_shown(kits, rows_file, capsys):
    kit = kits[1]
    secret = "Anna Nass, born 1950"
    rows = [{"instruction": "x", "input": secret, "output": "y"}, {"input": secret}]
    write_description(replace(kit, settings={"train_file": rows_file(rows, "secret.json")}))
    main(["check", "site", "--kit", str(kit.directory)])
    captured = capsys.readouterr()
    assert "1 broken" in captured.out
    assert secret not in captured.out + captured.err


def test_keys_that_do_not_belong_together(kits):
    kit = kits[1]
    other = kit.directory.parent / "b"
    assert check_keys(kit) == "site 0 of 2"
    shutil.copy(other / "site.key", kit.signing_key)
    with pytest.raises(ValueError, match=r"does not match site\.key"):
        check_keys(kit)
    shutil.copy(other / "node.pub", kit.node_public_key)
    with pytest.raises(ValueError, match=r"node\.key and node\.pub"):
        check_keys(kit)


def test_a_site_that_is_in_no_list(kits):
    kit = kits[1]
    keys = json.loads(kit.site_keys.read_text())
    kit.site_keys.write_text(json.dumps({"1": keys["1"]}))
    with pytest.raises(ValueError, match="revoked"):
        check_keys(kit)


@pytest.mark.parametrize(
    ("train_file", "text"),
    [("/not/there.json", "not/there.json"), (None, "train_file is missing")],
)
def test_rows_that_are_not_there(kits, train_file, text):
    settings = {
        "model_name_or_path": "clinic-base",
        **({"train_file": train_file} if train_file else {}),
    }
    work = Work(site.settings_of(settings))
    finding = run_check("data", work.check_data, site.THE_ROWS)
    assert work.rows is None
    assert not finding.ok
    assert text in finding.message
    assert "kit.yaml" in finding.remedy


def test_a_sample_of_less_than_a_row_is_told_before_a_run():
    private = {"privacy_unit": "record", "target_epsilon": 8.0, "sampling_rate": 1e-6}
    work = Work(site.settings_of({"train_file": "clinic", **private}))
    finding = run_check("data", work.check_data, site.THE_ROWS)
    assert not finding.ok
    assert "--sampling_rate 1e-06 is less than one of 2,400 rows" in finding.message


def test_the_rows_and_the_base_of_an_own_trainer_are_left_to_its_script(kits, monkeypatch):
    monkeypatch.setattr(site, "check_gate", lambda kit: [])
    kit = replace(kits[1], settings={})
    checks = [finding.what for finding in site.check_site(kit, own_trainer=True)]
    assert checks == ["versions", "files", "keys", "policy"]


@pytest.mark.filterwarnings("ignore:The PEFT config's:UserWarning")  # quiet() leaves it out
def test_memory_is_compared_with_what_is_left(kits, monkeypatch):
    settings = site.settings_of({**kits[1].planned, **kits[1].settings})
    for available, good in ((2**20, False), (2**35, True)):
        left = SimpleNamespace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda left=left: left)
        work = Work(settings)
        finding = run_check("memory", work.check_memory)
        assert finding.ok is good
        assert good or "gradient_checkpointing" in finding.remedy
        assert work.adapter_parameters > 0


@pytest.mark.parametrize("broken", ["authority", "client_key"])
def test_a_file_of_the_kit_that_is_none_is_named(kits, broken):
    kit = kits[1]
    other = make_authority("another")[0] if broken == "client_key" else b"no certificate"
    getattr(kit, broken).write_bytes(other)
    what = {"authority": "ca.crt is not a certificate", "client_key": "client.key does not match"}
    with pytest.raises(Fault, match=what[broken]):
        site._Gate(kit, None).certificate()


def test_a_model_that_is_not_there(kits):
    settings = site.settings_of({"model_name_or_path": "/no/model", "train_file": "clinic"})
    work = Work(settings)
    with pytest.raises(ValueError, match="/no/model"):
        work.check_memory()
    assert work.adapter_parameters is None


def test_a_kit_names_the_versions_that_a_bases_fingerprint_depends_on(kits):
    for kit in kits:
        assert {"fedfora", "flwr", "torch", "transformers", "peft", "bitsandbytes"} <= set(
            kit.made_with
        )
        assert "differs" not in check_versions(kit.made_with)


@pytest.mark.parametrize(
    ("name", "here", "there", "said"),
    [
        ("flwr", "1.41.0", "1.42.0", "flwr 1.42.0 (tried together)"),
        ("flwr", "1.42.0", "1.22.0", "flwr 1.22.0 (not tried together)"),
        ("transformers", "5.24.0", "5.20.0", "transformers 5.20.0 (tried together)"),
        ("transformers", "5.24.0", "5.9.1", "transformers 5.9.1 (not tried together)"),
        ("torch", "2.13.0+cpu", "2.13.0+cu130", ""),
        ("fedfora", "0.1.0", "0.2.0rc1", "fedfora 0.2.0rc1 (not tried together)"),
    ],
)
def test_other_versions_are_named_and_keep_no_site_away(monkeypatch, name, here, there, said):
    monkeypatch.setattr(checks, "installed_version", lambda package: {name: here}.get(package, "1"))
    assert check_versions({name: there}).partition("; the federation has ")[2] == said


def test_modes_and_disk(kits, tmp_path):
    kit = kits[1]
    assert "readable only by you" in check_modes(kit.directory, kit.private_files)
    kit.directory.chmod(0o750)
    with pytest.raises(Fault) as fault:
        check_modes(kit.directory, [])
    assert f"chmod 700 {kit.directory}" in fault.value.remedy
    assert "room for" in check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(Fault):
        check_disk(tmp_path, 2**60)


def ready(kit):
    return found(checks.check_federation(read_kit(kit.directory, CoordinatorKit)))


def test_a_coordinator_that_is_ready_passes(kits, capsys):
    status = main(["check", "federation", "--kit", str(kits[0].directory)])
    seen = ready(kits[0])
    assert (status == 0) is all(finding.ok for finding in seen.values())
    bad = {what for what, finding in seen.items() if not finding.ok}
    assert bad <= {"gate"}  # which only nginx can pass
    assert not bad or "nginx is not installed" in seen["gate"].message
    assert "ca.key" in seen["authority"].message
    kits[0].authority_key.unlink()
    assert "authority" not in ready(kits[0])


def test_what_is_wrong_with_a_coordinator_is_found(kits, tmp_path):
    kit = kits[0]
    start = datetime.now(UTC) - timedelta(days=9)
    expired = make_server(authority_of(kit), kit.host, valid_days=7, now=start)
    elsewhere = make_server(authority_of(kit), "b.example.org", valid_days=7)
    other = make_server(make_authority("clinics"), kit.host, valid_days=7)
    good = own_certificate(kit)
    for certified, text in (
        (expired, "not now"),
        ((elsewhere[0], elsewhere[1]), None),
        (other, "not signed by ca.crt"),
        ((expired[0], good[1]), "server.key does not match server.crt"),
    ):
        kit.server_key.write_bytes(certified[0])
        kit.server_certificate.write_bytes(certified[1])
        finding = ready(kit)["certificate"]
        if text is None:  # loopback is in every certificate
            finding = found(checks.check_federation(replace(kit, host="c.org")))["certificate"]
            text = "not for c.org"
        assert not finding.ok
        assert text in finding.message
        assert "--renew" in finding.remedy


def test_a_key_that_lets_in_somebody_unknown_is_found(kits):
    kit = kits[0]
    shutil.copy(kit.node("a"), kit.node("mallory"))
    finding = ready(kit)["sites"]
    assert not finding.ok
    assert "lets in mallory" in finding.message


def test_a_port_in_use_is_found(kits):
    import socket

    with socket.create_server(("127.0.0.1", kits[0].superlink_port)):
        finding = ready(kits[0])["superlink"]
    assert not finding.ok
    assert f"port {kits[0].superlink_port} is in use" in finding.message


def test_a_certificate_is_looked_at_while_the_federation_runs_and_a_new_one_is_taken_up(
    kits, monkeypatch
):
    """It was looked at when the coordinator started, and its end stopped the run in two seconds."""
    kit, said, signals, restarts = kits[0], [], [], []
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(coordinator, "time", clock)

    def certify(days, start_days=0):
        start = datetime.now(UTC) + timedelta(days=start_days)
        key, certificate = make_server(authority_of(kit), kit.host, valid_days=days, now=start)
        kit.server_key.write_bytes(key)
        kit.server_certificate.write_bytes(certificate)

    def pass_hours(count):
        for _ in range(count):
            clock.now += 3600
            daemon.check()

    certify(20)
    daemon = coordinator.Coordinator(kit, said.append)
    daemon._supervisor.check = lambda: None
    daemon._supervisor.children[1].process = SimpleNamespace(send_signal=signals.append)
    daemon.restart_superlink = lambda: restarts.append(clock.now)
    daemon._certificate = kit.server_certificate.read_bytes()
    pass_hours(20)
    (line,) = said
    assert "(19 days)" in line
    assert "--renew" in line
    certify(7, start_days=-9)
    daemon._certificate = kit.server_certificate.read_bytes()
    pass_hours(20)
    assert len(said) == 2
    assert "no site gets in" in said[1]
    assert not daemon.certificate_holds
    assert not signals
    certify(365)
    daemon.check()
    pass_hours(20)
    assert daemon.certificate_holds
    assert (signals, len(restarts)) == ([signal.SIGHUP], 1)
    assert len(said) == 3


def test_the_wrong_kit_or_none(kits, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "site"]) == 2
    assert "--kit .: no kit there" in capsys.readouterr().err
    assert main(["check", "site", "--kit", str(kits[0].directory)]) == 2
    assert "is a coordinator's kit" in capsys.readouterr().err
    assert main(["check", "federations"]) == 2
    assert "did you mean 'federation'" in capsys.readouterr().err
