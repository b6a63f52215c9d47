"""A federation over several hosts, and all that may go wrong between them: nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason='needs pip install "fedfora[privacy]"')

from fedfora.deployment.certificates import make_server
from fedfora.deployment.journal import disagreements, read_journal
from hosts import HostsFederation, Slurm, SplitSite
from real_federation import FLAGS, assert_same, listening, needs_nginx

pytestmark = [
    needs_nginx,
    pytest.mark.hosts,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for network namespaces"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs root and iproute2"),
    pytest.mark.skipif(shutil.which("squid") is None, reason="needs squid: apt install squid"),
]

ASK = """
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
plain = socket.create_connection(("coordinator.test", 8443), timeout=20)
channel = context.wrap_socket(plain, server_hostname="coordinator.test")
channel.sendall(b"POST /v1/fleet/get-run HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n")
print(channel.recv(100).split(b"\\r")[0].decode())
"""


@pytest.fixture
def real(tmp_path, tiny_dir, rows):
    """Three sites: one near, one far away behind a bad line, one behind a proxy."""
    sites = {
        name: {"train_file": str(rows[name]), "model_name_or_path": tiny_dir}
        for name in sorted(rows)[:3]
    }
    flags = {**FLAGS, "num_rounds": 1000, "round_deadline": 40.0}
    federation = HostsFederation(tmp_path, flags, sites, quorum=1)
    disk = federation.site_kit(federation.names[0]) / "state"
    disk.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", disk], check=True)
    yield federation
    federation.stop()
    subprocess.run(["umount", "--lazy", disk], check=True)


def who(real):
    """The sites of each round."""
    return [[site["site"] for site in event["sites"]] for event in real.events("round")]


def until_all(real, since):
    """Wait for a round with all sites."""
    real.until(lambda: any(len(sites) == 3 for sites in who(real)[since:]))


def until_without(real, name, since):
    """Wait for a round without a site, in which the others were."""
    real.until(lambda: any(name not in sites for sites in who(real)[since:]))


def fill(directory):
    with suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))


def said(real, name="coordinator"):
    return (real.place / "logs" / f"{name}.log").read_text()


def test_whatever_goes_wrong_between_hosts_no_round_is_lost_and_the_cause_is_named(real):
    near, far, proxied = real.names
    network = real.network

    # A certificate that is over: named before anything starts, and renewed.
    authority = real.kit.authority_key.read_bytes(), real.kit.authority.read_bytes()
    start = datetime.now(UTC) - timedelta(days=9)
    key, certificate = make_server(authority, real.kit.host, valid_days=7, now=start)
    real.kit.server_key.write_bytes(key)
    real.kit.server_certificate.write_bytes(certificate)
    real.coordinate()
    assert real.wait() == 2
    assert "--renew" in said(real)
    real.provision(renew=True)

    # 150 ms each way and 1 % loss at one site; the only way out of another is a proxy.
    real.helpers += [line for line in [network.slow(real.hosts[far], 0.15, 0.01)] if line]
    real.start_proxy()
    real.coordinate()
    real.join(*real.names)
    until_all(real, 0)
    route = network.inside(real.hosts[proxied], "ip", "route", "get", "10.77.0.1", check=False)
    assert "unreachable" in route.stderr
    assert "CONNECT coordinator.test:8443" in real.proxy_log.read_text()
    checked = real.check(proxied)
    assert "coordinator.test is reached through the proxy http://10.78.0.1:3128" in checked
    assert "FAIL" not in checked.partition("data")[0]

    # An outsider, with the authority's certificate in hand.
    command = network.command("outsider", sys.executable, "-c", ASK, str(real.kit.authority))
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("HTTP/1.1 400")
    behind = "import socket; socket.create_connection(('10.77.0.1', 9092), timeout=5)"
    command = network.command("outsider", sys.executable, "-c", behind)
    assert b"ConnectionRefusedError" in subprocess.run(command, capture_output=True).stderr

    # A cut cable: the others go on; healed, the site is back by itself.
    rounds = len(who(real))
    network.cut(real.hosts[near], True)
    until_without(real, near, rounds)
    network.cut(real.hosts[near], False)
    until_all(real, len(who(real)))
    assert near in "".join(line for line in said(real).splitlines() if "without" in line)

    # A full disk at a site, said by its code; with room again it is back.
    rounds, state = len(who(real)), real.site_kit(near) / "state"
    fill(state)
    until_without(real, near, rounds)
    assert "site-error DISK " in " ".join(real.reasons(near).values())
    (state / "filler").unlink()
    until_all(real, len(who(real)))

    # The coordinator's machine loses its power; the same command resumes.
    before = len(who(real))
    real.end("coordinator", signal.SIGKILL)
    real.until(lambda: not real.pids(str(real.kit.directory)))
    real.coordinate()
    real.until(lambda: real.events("resumed"))
    until_all(real, len(who(real)))
    assert len(who(real)) >= before - 1
    numbers = [event["round"] for event in real.events("round")]
    assert numbers == list(range(1, len(numbers) + 1))

    # The journals of all hosts are whole, and agree.
    real.end("coordinator")
    ours = read_journal(real.kit.state)
    for name in real.names:
        real.end(name)
        assert disagreements(ours, read_journal(real.site_kit(name) / "state")) == []
    addresses = {line["site"]: line["address"] for line in ours if line["event"] == "address"}
    assert addresses == {near: "10.77.0.2", far: "10.77.0.3", proxied: "10.77.0.9"}


def test_hosts_give_the_same_adapter_as_one_machine(tmp_path, tiny_dir, rows, embedded):
    """To the bit, with a proxy and a bad line between, and a coordinator whose machine is lost: the
    same command on another, in another directory, resumes, and the sites find it by its name."""
    sites = {
        name: {"train_file": str(rows[name]), "model_name_or_path": tiny_dir}
        for name in sorted(rows)[:2]
    }
    place = tmp_path / "hosts"
    place.mkdir()
    real = HostsFederation(place, {**FLAGS, "num_rounds": 6}, sites, quorum=2)
    try:
        real.helpers += [x for x in [real.network.slow(real.hosts[real.names[0]], 0.1, 0.01)] if x]
        real.start_proxy()
        real.coordinate()
        real.join(*real.names)
        real.until(lambda: real.round_reached(2))
        lost = real.kit.directory
        real.lose_coordinator()
        real.coordinate()
        assert real.wait() == 0, real.logs()
        assert real.events("resumed")
        assert not lost.exists()
        assert_same(real.run_directory, embedded(2, num_rounds=6))
        ours = read_journal(real.kit.state)
        for name in real.names:
            real.end(name)
            assert disagreements(ours, read_journal(real.site_kit(name) / "state")) == []
    finally:
        real.stop()


ATTACK = """
import json, os, re, socket, sys, time
from pathlib import Path
files, sock, pids, port = json.loads(sys.argv[1])
got = {"files": [], "processes": [], "socket": False, "tokens": [], "clients": 0, "task": ""}
for name in files:
    try:
        open(name, "rb").close()
        got["files"].append(name)
    except OSError:
        pass
for pid in pids:
    for part in ("environ", "mem", "maps", "fd/0", "cwd"):
        try:
            os.open(f"/proc/{pid}/{part}", os.O_RDONLY)
            got["processes"].append(f"{pid}/{part}")
        except OSError:
            pass
try:
    socket.socket(socket.AF_UNIX).connect(sock)
    got["socket"] = True
except OSError:
    pass
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
api = RuntimeHttpClient.from_server_address(
    server_address=f"127.0.0.1:{port}", insecure=True, root_certificates=None,
    interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
)
try:
    api.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
    got["task"] = "taken"
except Exception as error:
    got["task"] = str(error)
while not got["clients"]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split(chr(0))
        except OSError:
            continue
        if "clientapp" in words and f"127.0.0.1:{port}" in words:
            got["clients"] += 1
            got["tokens"] += re.findall("[0-9a-f]{32}", " ".join(words))
print(json.dumps(got))
"""


def log(state):
    path = state / "logs" / "supernode.log"
    return path.read_text() if path.is_file() else ""


def test_rows_and_network_are_two_accounts_and_a_third_gets_nothing(tiny_dir, rows, embedded):
    """The account with the rows has no network, that with the network no rows; the adapter is the
    same to the bit. Another account reads no file, asks for no task and sees no token."""
    place = Path(tempfile.mkdtemp(prefix="fedfora-accounts-"))
    place.chmod(0o711)
    name = min(rows)
    real = SplitSite(place, {**FLAGS, "num_rounds": 12}, rows[name], tiny_dir)
    try:
        with_rows, with_network, guest = real.accounts
        kit = real.site_kit("north")
        real.coordinate()
        real.join()
        state = kit / "state"
        real.until(lambda: (state / "trainer.sock").exists() and "SuperNode ID" in log(state))
        pids = real.pids("sites/north")
        (port,) = {x for pid in real.pids("flower_processes supernode") for x in listening(pid)}
        files = [str(path) for path in [real.rows, *kit.rglob("*")] if path.is_file()]
        sock = str(state / "trainer.sock")
        got = real.asked(guest, "-c", ATTACK, json.dumps([files, sock, pids, port]))
        assert (got["files"], got["processes"], got["socket"]) == ([], [], False)
        assert "401" in got["task"]
        assert got["tokens"] == []
        read = real.asked(with_network, "-c", ATTACK, json.dumps([files, sock, [], port]))["files"]
        owners = {path: Path(path).owner() for path in files}
        assert str(kit / "node.key") in read
        assert not [path for path in read if owners[path] == with_rows]
        assert str(real.rows) not in read
        assert {owners[str(kit / "site.key")], owners[str(real.rows)]} == {with_rows}
        assert real.wait() == 0, real.logs()
        assert [len(event["sites"]) for event in real.events("round")] == [1] * 12
        assert_same(real.run_directory, embedded(1, num_rounds=12))
    finally:
        real.stop()
        shutil.rmtree(place)


@pytest.mark.skipif(shutil.which("slurmctld") is None, reason="needs slurmctld, slurmd and munge")
def test_a_site_that_is_a_slurm_job_is_requeued_and_the_adapter_is_the_same(federation, embedded):
    """The script of docs/clusters.md; told to end as at its time limit, the job comes again."""
    real = federation(2, quorum=2, num_rounds=4)
    stays, moves = real.names
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    home = real.place / "home"
    home.mkdir()
    (home / "job.sh").write_text("#!/bin/sh" + page.split("#!/bin/sh")[1].partition("```")[0])
    (home / "kit").symlink_to(real.site_kit(moves))
    (home / "venv").symlink_to(sys.prefix)
    place = Path(tempfile.mkdtemp(prefix="fedfora-slurm-"))
    place.chmod(0o711)
    slurm = Slurm(place)
    try:
        real.until(lambda: "idle" in slurm.run("sinfo"))
        words = [f"--export=ALL,HOME={home}", f"--output={home}/job.log", f"--chdir={home}"]
        submitted = slurm.run("sbatch", *words, str(home / "job.sh"))
        assert "Submitted batch job 1" in submitted, submitted
        real.coordinate()
        real.join(stays)
        real.until(lambda: real.round_reached(1))
        slurm.run("scancel", "--batch", "--signal=TERM", "1")
        real.until(lambda: "PENDING" in slurm.run("scontrol", "show", "job", "1"))
        assert not real.pids("sites", moves)
        slurm.run("scontrol", "update", "JobId=1", "StartTime=now+10")  # not in the same second
        assert real.wait() == 0, real.logs()
        assert "Restarts=1" in slurm.run("scontrol", "show", "job", "1")
        assert [len(event["sites"]) for event in real.events("round")] == [2] * 4
        assert_same(real.run_directory, embedded(2, num_rounds=4))
    finally:
        slurm.stop()
        shutil.rmtree(place)
