"""Which run is started, how it goes on, and what the files of a kit's state say of it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedfora.deployment import run_state
from fedfora.deployment.kit import CoordinatorKit
from fedfora.deployment.run import plan_run, tell, write_app
from fedfora.deployment.run_state import FINISHED, STOPPED, Outcome, PlannedRun, settings_for
from fedfora.federated.settings import from_run_config
from fedfora.federated.settings_scope import common_part
from fedfora.reporting.history import Follower
from fedfora.reporting.record import RunRecord

RUN = PlannedRun("clinics/001", 3, {"num_rounds": 2, "output_dir": "x"})


@pytest.fixture
def kit(tmp_path):
    (tmp_path / "state").mkdir()
    settings = {"num_rounds": 2, "model_name_or_path": "clinic-base", "min_clients": 1}
    return CoordinatorKit(tmp_path, "clinics", "127.0.0.1", 1, 2, quorum=2, settings=settings)


def plan(kit, new=False):
    return plan_run(kit, lambda text: None, new=new)


def test_the_first_run_has_the_kits_settings_and_waits_for_nothing_without_an_end(kit):
    run = plan(kit)
    assert (run.name, run.attempt) == ("clinics/001", 0)
    assert run.run_config["output_dir"] == str(kit.state / "runs" / "001")
    assert run.run_config["min_clients"] == 2
    assert run.run_config["round_deadline"] == 3600
    assert run.run_config["start_deadline"] == 600


@pytest.mark.parametrize("status", [None, STOPPED])
def test_a_run_that_has_not_come_to_its_end_goes_on_unless_a_new_one_is_asked_for(kit, status):
    (kit.state / "runs" / "001").mkdir(parents=True)
    run_state.write_run(kit.state, RUN)
    if status is not None:
        run_state.write_outcome(kit.state, Outcome(RUN.name, RUN.attempt, status, "no quorum"))
    assert plan(kit) == RUN
    assert plan(kit, new=True).name == "clinics/002"


def test_after_a_finished_run_comes_another(kit):
    (kit.state / "runs" / "001").mkdir(parents=True)
    run_state.write_run(kit.state, RUN)
    run_state.write_outcome(kit.state, Outcome(RUN.name, RUN.attempt, FINISHED, ""))
    assert plan(kit).name == "clinics/002"


def test_an_outcome_of_an_earlier_attempt_is_none_of_this_one(kit):
    run_state.write_outcome(kit.state, Outcome(RUN.name, RUN.attempt - 1, FINISHED, ""))
    assert run_state.read_outcome(kit.state, RUN) is None


def test_a_run_started_by_somebody_else_has_its_own_settings_and_the_kits_paths(kit):
    settings = settings_for(kit, kit.state / "x", {"num_rounds": 7})
    assert settings.federation.num_rounds == 7
    assert settings.model.model_name_or_path == "clinic-base"
    assert settings.rounds.min_clients == 2


def test_a_dead_process_that_nobody_waited_for_does_not_count_as_running(kit):
    run_state.write_begun(kit.state, RUN)
    assert run_state.is_running(kit.state, RUN)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        text = (
            (kit.state / run_state.SERVER).read_text().replace(str(os.getpid()), str(process.pid))
        )
        (kit.state / run_state.SERVER).write_text(text)
        assert run_state.has_begun(kit.state, RUN)
        assert not run_state.is_running(kit.state, RUN)
    assert not run_state.is_running(kit.state, RUN)


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
        "round 2        1 sites   training loss 2.000   F1 0.250",
        "round 3: lost: wrong shares of b",
    ]


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
