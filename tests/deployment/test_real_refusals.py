"""Real processes, and who or what is refused: keys, bases, dates, a full disk; the rest goes on."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from fedfora.cli.main import main
from fedfora.deployment.certificates import make_node_key, make_server
from fedfora.deployment.flower_processes import free_port
from fedfora.deployment.journal import disagreements, read_journal
from fedfora.deployment.run import write_app
from fedfora.federated.coordinator.checkpoint import find_checkpoints
from real_federation import FLAGS, PATIENCE_S, assert_same, listening, needs_nginx

BAD_COORDINATOR = Path(__file__).parents[1] / "bad_coordinator.py"

RESULTS = ("ok  ", "FAIL")  # how the lines of checks begin

pytestmark = [needs_nginx, pytest.mark.deploy]


def test_a_site_comes_late_and_another_is_revoked_while_the_run_is_on(federation, rows):
    real = federation(2, num_rounds=1000, round_deadline=60.0)
    stays, revoked = real.names

    def taken_part():
        return [[site["site"] for site in event["sites"]] for event in real.events("round")]

    late = sorted(rows)[2]
    real.coordinate()
    real.join(stays, revoked)
    real.until(lambda: real.round_reached(1))
    own = real.plan["sites"][stays]
    real.plan["sites"][late] = {**own, "train_file": str(rows[late])}
    assert real.provision().added == [late]
    real.join(late)
    real.until(lambda: any(event["site"] == late for event in real.events("joined")))
    real.provision(revoke=revoked)
    real.until(lambda: taken_part()[-1] == [stays, late])
    assert taken_part()[0] == [stays, revoked]


def test_a_site_with_a_strange_key_is_refused_and_the_rest_goes_on(federation):
    real = federation(2, num_rounds=1, start_deadline=90.0)
    known, stranger = real.names
    private, public = make_node_key()
    (real.site_kit(stranger) / "node.key").write_bytes(private)
    (real.site_kit(stranger) / "node.pub").write_bytes(public)
    real.coordinate()
    real.join(known, stranger)
    assert real.wait() == 0, real.logs()
    assert [site["site"] for site in real.events("round")[0]["sites"]] == [known]
    log = real.site_kit(stranger) / "state" / "logs" / "supernode.log"
    assert "305" in log.read_text()


def test_a_second_holder_of_a_kit_is_turned_away_and_an_alarm_and_the_site_goes_on(federation):
    real = federation(1, num_rounds=1000)
    (name,) = real.names
    hook = real.kit.directory / "alarm"
    hook.write_text('#!/bin/sh\ncat >> "$(dirname "$0")/told.jsonl"\n')
    hook.chmod(0o700)
    real.coordinate()
    real.join(name)
    real.until(lambda: real.round_reached(1))
    stolen = real.place / "stolen"
    shutil.copytree(real.site_kit(name), stolen, ignore=shutil.ignore_patterns("state"))
    real.start("thief", "-m", "fedfora", "site", "--kit", str(stolen))
    told = real.kit.directory / "told.jsonl"
    real.until(lambda: told.is_file() and "second_holder" in told.read_text())
    alarm = json.loads(told.read_text().splitlines()[0])
    assert (alarm["event"], alarm["site"], alarm["alarm"]) == ("second_holder", name, True)
    rounds = len(real.events("round"))
    real.until(lambda: len(real.events("round")) > rounds)
    lines = read_journal(real.kit.state)
    assert [line["event"] for line in lines if line.get("alarm")] == ["second_holder"]
    assert disagreements(lines, read_journal(real.site_kit(name) / "state")) == []


def test_a_site_with_another_base_than_the_others_is_left_out_and_named(federation):
    """The kits pin no base here; where they do, the site refuses to take part by itself."""
    real = federation(3, quorum=2, num_rounds=1)
    other = real.names[0]
    kit = real.site_kit(other) / "kit.yaml"
    kit.write_text(
        kit.read_text().replace(real.plan["sites"][other]["model_name_or_path"], "clinic-base")
    )
    real.coordinate()
    real.join(*real.names)
    assert real.wait() == 0, real.logs()
    assert [site["site"] for site in real.events("round")[0]["sites"]] == real.names[1:]
    said = (real.place / "logs" / "coordinator.log").read_text()
    assert f"{other} takes no part: its base-fingerprint is " in said


def test_a_sites_policy_refuses_by_name_before_any_work_and_the_rest_goes_on(federation):
    """One from the beginning; one from the round on after which its administrator says so."""
    real = federation(3, num_rounds=4)
    stays, never, ends = real.names
    (real.site_kit(never) / "policy.yaml").write_text("rank: 1\n")
    real.coordinate()
    real.join(*real.names)
    real.until(lambda: real.round_reached(1))
    (real.site_kit(ends) / "policy.yaml").write_text("until: 2026-01-31\n")
    assert real.wait() == 0, real.logs()
    rounds = [[site["site"] for site in event["sites"]] for event in real.events("round")]
    assert rounds[0] == [stays, ends]
    assert rounds[-1] == [stays]
    said = (real.place / "logs" / "coordinator.log").read_text()
    assert re.search(rf"{never} takes no part: .*site-error POLICY_RANK ", said)
    assert "site-error POLICY_UNTIL " in real.reasons(ends)[4]
    log = (real.site_kit(ends) / "state" / "logs" / "trainer.log").read_text()
    assert "policy.yaml: until: 2026-01-31 is over" in log
    assert not list((real.site_kit(never) / "state" / "runs").glob("*/*"))


def test_code_that_comes_with_a_run_is_not_run_at_a_site(federation):
    """At the coordinator it is, and leaves its trace there."""
    real = federation(1, num_rounds=1)
    traces = real.place / "traces"
    traces.mkdir()
    words = [str(BAD_COORDINATOR), "client", str(real.kit.directory), str(traces)]
    real.start("coordinator", *words)
    real.join(*real.names)
    assert real.wait() == 0, real.logs()
    assert len(real.events("round")) == 1
    assert sorted(path.name for path in traces.iterdir()) == ["__init__.py", "server.py"]
    for path in real.site_kit(real.names[0]).rglob("*.py"):
        assert "was here" not in path.read_text()


def test_an_agentapp_that_comes_with_a_run_is_not_run_at_a_site(federation):
    """Whoever has an account on the coordinator's machine starts it; the site serves on."""
    real = federation(1)
    (name,) = real.names
    traces = real.place / "traces"
    traces.mkdir()
    kit = str(real.kit.directory)
    real.start("coordinator", "-m", "fedfora", "coordinator", "--kit", kit)
    real.join(name)
    said = real.place / "logs" / "coordinator.log"
    real.until(lambda: "is let in" in said.read_text())
    real.until(lambda: "SuperNode ID" in supernode_log(real, name))
    attack = [sys.executable, str(BAD_COORDINATOR), "agent", kit, str(traces)]
    subprocess.run(attack, check=True, capture_output=True)
    real.until(lambda: (traces / "coordinator").exists())
    real.until(
        lambda: "refused run" in supernode_log(real, name) or len(list(traces.iterdir())) > 1
    )
    assert [path.name for path in traces.iterdir()] == ["coordinator"]
    assert "Start `flwr-agentapp`" not in supernode_log(real, name)
    app = real.place / "app"
    write_app(app, FLAGS)
    home = {"FLWR_HOME": str(real.kit.state / "flower"), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    flwr = Path(sys.executable).with_name("flwr")
    subprocess.run([flwr, "run", app, "fedfora"], env={**os.environ, **home}, check=True)
    attempt = real.kit.state / "attempt.json"
    real.until(lambda: attempt.is_file() and "begun" not in attempt.read_text())
    assert '"finished"' in attempt.read_text(), real.logs()


def supernode_log(real, name):
    """What a site's SuperNode has logged."""
    path = real.site_kit(name) / "state" / "logs" / "supernode.log"
    return path.read_text() if path.is_file() else ""


def test_nobody_else_on_a_sites_machine_takes_its_tasks(federation):
    """Not even the same account, without the SuperNode's secret; and no token is in a command."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    real = federation(1, num_rounds=2)
    (name,) = real.names
    real.coordinate()
    real.join(name)
    real.until(lambda: "SuperNode ID" in supernode_log(real, name))
    (port,) = {port for pid in real.pids("flower_processes supernode") for port in listening(pid)}
    stolen, answers, commands = [], set(), set()
    api = RuntimeHttpClient.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
    )

    def tried():
        """Ask for a task once more; say whether the run is over."""
        try:
            task = api.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
            stolen.extend([task.token] if task.token else [])
        except Exception as error:
            answers.add(str(error))
        commands.update(commands_with("clientapp", f"127.0.0.1:{port}"))
        return real.children["coordinator"].process.poll() is not None

    real.until(tried)
    api.close()
    assert not stolen
    assert any("401" in text for text in answers), answers
    assert commands, "no client was seen"
    assert not [line for line in commands if re.search("[0-9a-f]{32}", line)]
    assert [len(event["sites"]) for event in real.events("round")] == [1, 1], real.logs()


def commands_with(*parts):
    """Command lines that have all these parts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode()
            found += [line] if all(part in line for part in parts) else []
    return found


def test_with_a_proxy_in_the_environment_a_machine_still_reaches_itself(federation, monkeypatch):
    """The SuperLink was asked for by way of the proxy, and the command waited without a word."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    real = federation(1, num_rounds=1)
    real.coordinate()
    real.join(*real.names)
    assert real.wait() == 0, real.logs()
    assert len(real.events("round")) == 1


def test_a_coordinator_whose_certificate_is_over_says_so_and_goes_on_with_a_new_one(federation):
    """The sites' kits stay as they are: they trust the authority. Then the next run is started."""
    real = federation(1, num_rounds=1)
    start = datetime.now(UTC) - timedelta(days=9)
    authority = real.kit.authority_key.read_bytes(), real.kit.authority.read_bytes()
    key, certificate = make_server(authority, "127.0.0.1", valid_days=7, now=start)
    real.kit.server_key.write_bytes(key)
    real.kit.server_certificate.write_bytes(certificate)
    real.join(*real.names)
    real.coordinate()
    assert real.wait() == 2
    said = (real.place / "logs" / "coordinator.log").read_text()
    assert "server.crt is valid from" in said
    assert "--renew" in said
    real.provision(renew=True)
    real.coordinate()
    assert real.wait() == 0, real.logs()
    assert len(real.events("round")) == 1
    real.coordinate()
    assert real.wait() == 0, "a second run on the same kit\n" + real.logs()
    assert real.run_directory.name == "002"
    assert len(real.events("round")) == 1


def test_a_coordinator_moves_to_another_address_and_its_run_goes_on(federation, embedded):
    """Of a site's kit two values change; no key of a site does, nor the authority."""
    real = federation(2, quorum=2, num_rounds=3)
    real.coordinate()
    real.join(*real.names)
    real.until(lambda: real.round_reached(1))
    for name in ("coordinator", *real.names):
        real.end(name)
    moved = {"host": "127.0.0.2", "port": free_port()}
    real.plan["coordinator"] = {**moved, "superlink_port": free_port()}
    real.done = real.provision(renew=True)
    for name in real.names:
        path = real.site_kit(name) / "kit.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"coordinator": moved}))
    real.coordinate()
    real.join(*real.names)
    assert real.wait() == 0, real.logs()
    assert real.events("resumed")
    assert_same(real.run_directory, embedded(2, num_rounds=3))


def test_a_rehearsal_passes_a_site_that_is_ready_and_says_what_is_wrong_with_another(
    federation, capsys
):
    real = federation(2, num_rounds=3)
    ready, other = real.names
    real.plan["sites"][other]["train_file"] = "/not/there.json"
    plan = real.place / "rehearsed.yaml"
    plan.write_text(yaml.safe_dump(real.plan))
    words = ["--rehearsal_rounds", "1", "--deadline", str(PATIENCE_S)]
    assert main(["rehearse", str(plan), *words]) == 2
    printed = capsys.readouterr()
    lines = {line.split()[1]: line for line in printed.out.splitlines() if line[:4] in RESULTS}
    assert lines["coordinator"].startswith("ok")
    assert lines[ready].startswith("ok")
    assert "1 of 1 round" in lines[ready]
    assert lines[other].startswith("FAIL")
    assert "0 of 1 round: site-error DATA" in lines[other]
    assert "no such file: /not/there.json" in lines[other]
    assert "1 of 3 checks failed" in printed.err


@pytest.fixture
def small_disk():
    """A function that puts a small disk into a directory."""
    mounted = []

    def mount(directory, size):
        directory.mkdir(mode=0o700)
        words = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(directory)]
        if subprocess.run(words, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a small disk")
        mounted.append(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory):
    """Write until nothing more fits."""
    with suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    with suppress(OSError), (directory / "crumbs").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 64)


def test_a_full_disk_stops_the_run_with_a_reason_and_nothing_is_lost(
    federation, embedded, small_disk
):
    real = federation(2, quorum=2, num_rounds=4)
    small_disk(real.kit.state, "64m")
    real.join(*real.names)
    real.coordinate()
    real.until(lambda: real.round_reached(1) and find_checkpoints(real.run_directory))
    fill(real.kit.state)
    assert real.wait() == 2, real.logs()
    said = (real.place / "logs" / "coordinator.log").read_text()
    assert "No space left" in said
    for name in ("filler", "crumbs"):
        os.unlink(real.kit.state / name)
    real.coordinate()
    assert real.wait() == 0, real.logs()
    assert real.events("resumed")
    assert_same(real.run_directory, embedded(2, num_rounds=4))
