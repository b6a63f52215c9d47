"""Which run is started, how it goes on, and what the files of a kit's state say of it."""

import os
import shutil
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedfora.deployment import run, run_state
from fedfora.deployment.certificates import make_server
from fedfora.deployment.coordinator import Coordinator
from fedfora.deployment.kit import CoordinatorKit, SiteKit, read_kit
from fedfora.deployment.run import plan_run, tell, write_app
from fedfora.deployment.run_state import (
    FAILED,
    FINISHED,
    STOPPED,
    PlannedRun,
    settings_for,
)
from fedfora.deployment.site import children, run_site
from fedfora.federated.settings import from_run_config
from fedfora.federated.settings_scope import common_part
from fedfora.reporting.history import Follower
from fedfora.reporting.record import RunRecord

RUN = PlannedRun("clinics/001", 3, {"num_rounds": 2, "output_dir": "x"})


@pytest.fixture
def kit(tmp_path):
    (tmp_path / "state").mkdir()
    settings = {"num_rounds": 2, "model_name_or_path": "clinic-base", "min_clients": 1}
    return CoordinatorKit(
        directory=tmp_path,
        federation="clinics",
        host="127.0.0.1",
        port=1,
        superlink_port=2,
        quorum=2,
        settings=settings,
        sites={},
    )


def plan(kit, new=False):
    return plan_run(kit, lambda text: None, new=new)


def test_the_first_run_has_the_kits_settings_and_waits_for_nothing_without_an_end(kit):
    first = plan(kit)
    assert (first.name, first.attempt) == ("clinics/001", 0)
    assert first.run_config["output_dir"] == str(kit.state / "runs" / "001")
    assert first.run_config["min_clients"] == 2
    assert first.run_config["round_deadline"] == 3600
    assert first.run_config["start_deadline"] == 600


def test_a_directory_that_somebody_left_among_the_runs_is_no_run(kit):
    for name in ("001", "002-copy", "7old"):
        (kit.state / "runs" / name).mkdir(parents=True)
    assert plan(kit).name == "clinics/002"


@pytest.mark.parametrize("status", [None, STOPPED])
def test_a_run_that_has_not_come_to_its_end_goes_on_unless_a_new_one_is_asked_for(kit, status):
    (kit.state / "runs" / "001").mkdir(parents=True)
    run_state.write_run(kit.state, RUN)
    if status is not None:
        run_state.write_attempt(kit.state, RUN, status, "no quorum")
    place = str(kit.state / "runs" / Path(RUN.run_config["output_dir"]).name)
    assert plan(kit) == replace(RUN, run_config={**RUN.run_config, "output_dir": place})
    assert plan(kit, new=True).name == "clinics/002"


def test_a_kit_that_was_moved_goes_on_in_its_own_directory(kit, tmp_path):
    """Another machine may have another base directory; nothing is written to the old one."""
    began = replace(RUN, run_config=plan(kit).run_config)
    run_state.write_run(kit.state, began)
    moved = replace(kit, directory=tmp_path / "elsewhere")
    (moved.state / "runs" / "001" / "round-001").mkdir(parents=True)
    (moved.state / "runs" / "001" / "round-001" / "state.json").write_text("{}")
    shutil.copy(kit.state / "run.json", moved.state)
    config = run._next_attempt(plan(moved), moved.state / "runs" / "001").run_config
    place = str(moved.state / "runs" / "001")
    assert config == {**began.run_config, "output_dir": place, "resume": place}


def test_what_rounds_have_spent_lies_in_the_coordinators_kit(kit, monkeypatch):
    """So that a kit on another machine has it, too; a variable names another place."""
    monkeypatch.delenv("FEDFORA_PRIVACY_DIR")
    superlink, _ = Coordinator(kit, print)._children()
    assert superlink.environment["FEDFORA_PRIVACY_DIR"] == str(kit.state / "privacy")
    monkeypatch.setenv("FEDFORA_PRIVACY_DIR", "/srv/ledgers")
    superlink, _ = Coordinator(kit, print)._children()
    assert superlink.environment["FEDFORA_PRIVACY_DIR"] == "/srv/ledgers"


def test_a_running_coordinator_takes_up_a_renewed_certificate_and_says_when_one_ends(
    provisioned, monkeypatch
):
    kit, said, got = provisioned().kit, [], []
    coordinator = Coordinator(kit, said.append)
    superlink, gate = coordinator._supervisor.children
    monkeypatch.setattr(superlink, "signal", lambda number: got.append(("SuperLink", number)))
    gate.process = SimpleNamespace(send_signal=lambda number: got.append(("gate", number)))
    coordinator._certificate = kit.server_certificate.read_bytes()
    coordinator._watch_certificate()
    assert (said, got) == ([], [])
    authority = kit.authority_key.read_bytes(), kit.authority.read_bytes()

    def renewed(**times):
        key, certificate = make_server(authority, kit.host, valid_days=7, **times)
        kit.server_key.write_bytes(key)
        kit.server_certificate.write_bytes(certificate)
        coordinator._watch_certificate()

    renewed()
    assert got == [("gate", signal.SIGHUP), ("SuperLink", signal.SIGKILL)]
    assert "renew it soon" in said[0]
    renewed(now=datetime.now(UTC) - timedelta(days=9))
    assert said[-1].startswith("no site gets in: server.crt is valid from")
    assert len(got) == 2


def test_an_account_starts_what_it_has_the_key_for(provisioned, monkeypatch):
    """And what PyTorch compiles lies in the kit, not under a name that others may take first."""
    place = provisioned().place / "sites" / "cardiology"
    kit = read_kit(place, SiteKit)
    trainer, supernode = children(kit)
    assert trainer.environment["TORCHINDUCTOR_CACHE_DIR"].startswith(str(kit.state))
    for key, expected in ((kit.signing_key, trainer), (kit.node_key, supernode)):
        monkeypatch.setattr(os, "access", lambda path, mode, key=key: path == key)
        assert [child.name for child in children(kit)] == [expected.name]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="can read none of its keys"):
        run_site(kit, print)


def test_after_a_finished_run_comes_another(kit):
    (kit.state / "runs" / "001").mkdir(parents=True)
    run_state.write_run(kit.state, RUN)
    run_state.write_attempt(kit.state, RUN, FINISHED)
    assert plan(kit).name == "clinics/002"


def test_an_outcome_of_an_earlier_attempt_is_none_of_this_one(kit):
    run_state.write_attempt(kit.state, replace(RUN, attempt=RUN.attempt - 1), FINISHED)
    assert run_state.read_attempt(kit.state, RUN) is None


def test_a_run_started_by_somebody_else_has_its_own_settings_and_the_kits_paths(kit):
    settings = settings_for(kit, kit.state / "x", {"num_rounds": 7})
    assert settings.federation.num_rounds == 7
    assert settings.model.model_name_or_path == "clinic-base"
    assert settings.rounds.min_clients == 2


def test_a_dead_process_that_nobody_waited_for_does_not_count_as_running(kit):
    run_state.write_attempt(kit.state, RUN)
    assert run_state.read_attempt(kit.state, RUN).is_running
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        attempt = replace(run_state.read_attempt(kit.state, RUN), pid=process.pid)
        assert not attempt.is_running
    assert not attempt.is_running


def test_every_event_of_a_run_is_told_and_a_loss_that_is_hidden_is_left_out(tmp_path):
    """Under record privacy and shared noise the coordinator's record holds no loss."""
    record = RunRecord(tmp_path, overwrite=False)
    lines: list[str] = []
    shown = Follower(tmp_path)
    record.log("round", round=1, sites=[{"site": "a"}, {"site": "b"}], scores={}, epsilon=0.5)
    record.log("round", round=2, sites=[{"site": "a"}], loss=2.0, scores={"f1": 0.25})
    record.log("lost", round=3, reason="wrong shares of b")
    record.log("finished")
    tell(shown, lines.append)
    assert lines == [
        "round 1        2 sites   epsilon 0.500",
        "round 2        1 site   training loss 2.000   F1 0.250",
        "round 3: lost: wrong shares of b",
    ]


def test_the_second_run_on_a_kit_has_not_begun_with_the_first_ones_process(kit):
    """Both are in their first attempt."""
    first, second = (PlannedRun(f"clinics/00{i}", 1, RUN.run_config) for i in (1, 2))
    run_state.write_attempt(kit.state, first)
    assert run_state.read_attempt(kit.state, first).status == run_state.BEGUN
    assert run_state.read_attempt(kit.state, second) is None


class FakeTime:
    """Seconds that pass when somebody sleeps."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeCoordinator:
    """A coordinator whose SuperLink lets a run begin, which ends as it is told."""

    starts, knows_all_sites, certificate_holds = 1, True, True

    def __init__(self, kit, clock, ends):
        self.kit, self.clock, self.ends = kit, clock, iter(ends)
        self.flower, self.started_at, self.message = self, [], []

    def say(self, text):
        self.message.append((self.clock.now, text))

    def check(self):
        pass

    def start(self, app):
        planned = run_state.read_run(self.kit.state)
        self.started_at.append(self.clock.now)
        status = next(self.ends)
        run_state.write_attempt(self.kit.state, planned, status, "no route")


def followed(kit, monkeypatch, ends):
    clock = FakeTime()
    monkeypatch.setattr(run, "time", clock)
    coordinator = FakeCoordinator(kit, clock, ends)
    with suppress(ValueError):
        run.follow_run(coordinator, plan(kit), coordinator.say)
    return coordinator


def test_a_run_that_fails_again_and_again_is_tried_over_more_than_a_quarter_of_an_hour(
    kit, monkeypatch
):
    """A certificate that had ended cost a federation its four tries within two seconds."""
    coordinator = followed(kit, monkeypatch, [FAILED] * 99)
    pauses = [b - a for a, b in pairwise(coordinator.started_at)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 10
    assert sum(pauses) > 900


def test_a_run_that_fails_once_goes_on(kit, monkeypatch):
    coordinator = followed(kit, monkeypatch, [FAILED, FINISHED])
    assert len(coordinator.started_at) == 2


def test_a_command_that_waits_says_where_the_logs_lie(kit, monkeypatch):
    """With a proxy in between the SuperLink was never reached, and nothing was said."""
    monkeypatch.setattr(FakeCoordinator, "knows_all_sites", False)
    clock = FakeTime()
    monkeypatch.setattr(run, "time", clock)
    coordinator = FakeCoordinator(kit, clock, [])

    def check():
        if clock.now > 2000:
            raise TimeoutError

    coordinator.check = check
    with pytest.raises(TimeoutError):
        run.follow_run(coordinator, plan(kit), coordinator.say)
    ((when, text),) = coordinator.message
    assert 1060 <= when < 1070
    assert str(kit.state / "logs") in text


# The example and what a run ships are the same files; no setting of anybody's own is in them.


EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_app"


def config():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    return project["tool"]["flwr"]["app"]["config"]


def test_the_example_is_what_a_run_ships(tmp_path):
    write_app(tmp_path, config())
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*")}
    kept = {
        p.relative_to(EXAMPLE): p.read_text() for p in EXAMPLE.rglob("*.*") if p.suffix != ".pyc"
    }
    assert written == kept


def test_its_settings_are_those_that_travel():
    assert common_part(config()) == config()
    assert from_run_config(config()).federation.num_rounds == config()["num_rounds"]
