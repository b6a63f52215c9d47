"""Who gives no sign of life hangs: an operation beyond its time, a process that is stopped."""

import errno
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedfora.deployment import supervisor
from fedfora.deployment.supervisor import Child, Heartbeat, HeartbeatMonitor, Supervisor

# A process that gives signs: of an operation with a limit and a length, then of waiting.
PROGRAM = """
import sys, time
from pathlib import Path
from fedfora.deployment import supervisor
supervisor.BEAT_S = 0.05
own = supervisor.Heartbeat(Path(sys.argv[1]))
own.start()
with own.during(float(sys.argv[2])):
    time.sleep(float(sys.argv[3]))
time.sleep(1000)
"""


@pytest.fixture
def supervised(tmp_path):
    """A function from limit and length of an operation to a process that is watched."""
    running = ExitStack()

    def run(limit_s, length_s, silence_s=1.0):
        watch = HeartbeatMonitor(tmp_path / supervisor.HEARTBEAT, silence_s=silence_s)
        command = [sys.executable, "-c", PROGRAM, str(watch.path), str(limit_s), str(length_s)]
        log = tmp_path / "trainer.log"
        watched = {"after_start": watch.begin, "trouble": watch.problem}
        child = Child("trainer", lambda: command, log, **watched)
        said = []
        keeper = Supervisor([child], said.append)
        running.enter_context(keeper.running())

        def until(condition, seconds=120):
            give_up = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < give_up, said
                keeper.check()
                time.sleep(0.02)

        until(watch.path.exists)
        return child, said, until

    with running:
        yield run


def ends(said):
    return [text for text in said if "hangs" in text]


def test_an_operation_that_outlives_its_time_is_ended_and_its_process_started_again(
    supervised,
):
    child, said, until = supervised(0.3, 1000)
    first = child.process.pid
    until(lambda: child.is_alive and child.process.pid != first)
    assert ends(said) == ["trainer hangs: no sign of life for 1 s; ending it"]
    assert any("killed by signal 9" in text for text in said)


def test_a_process_that_is_stopped_is_ended(supervised):
    child, said, until = supervised(1000, 0)
    first = child.process.pid
    os.kill(first, signal.SIGSTOP)
    until(lambda: child.is_alive and child.process.pid != first)
    assert ends(said) == ["trainer hangs: no sign of life for 1 s; ending it"]


def test_who_works_within_its_time_or_waits_is_left_alone(supervised):
    child, said, until = supervised(1000, 1.5, silence_s=5.0)
    first, enough = child.process.pid, time.monotonic() + 7
    until(lambda: time.monotonic() > enough)
    assert ends(said) == []
    assert child.process.pid == first


def test_who_has_not_begun_to_give_signs_is_not_missed(tmp_path):
    watch = HeartbeatMonitor(tmp_path / supervisor.HEARTBEAT, silence_s=0.0)
    assert watch.problem() is None
    watch.path.write_text("waiting")
    assert watch.problem() is not None
    assert watch.problem() is None, "it is said once"


def test_a_full_disk_is_no_reason_to_stop(tmp_path, monkeypatch):
    asked = []

    def touch(path):
        asked.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", touch)
    monkeypatch.setattr(supervisor, "BEAT_S", 0.01)
    Heartbeat(tmp_path / supervisor.HEARTBEAT).start()
    give_up = time.monotonic() + 120
    while len(asked) < 3:
        assert time.monotonic() < give_up
        time.sleep(0.01)
