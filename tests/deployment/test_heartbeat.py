"""Who gives no sign of life hangs: an operation beyond its time, a process that is stopped."""

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from fedfora.deployment import heartbeat
from fedfora.deployment.heartbeat import Heartbeat, HeartbeatMonitor
from fedfora.deployment.supervisor import Child, Supervisor

# A process that gives signs: of an operation with a limit and a length, then of waiting.
PROGRAM = """
import sys, time
from pathlib import Path
from fedfora.deployment import heartbeat
heartbeat.BEAT_S = 0.05
own = heartbeat.Heartbeat(Path(sys.argv[1]))
own.start()
with own.during("train", float(sys.argv[2])):
    time.sleep(float(sys.argv[3]))
time.sleep(1000)
"""


@pytest.fixture
def supervised(tmp_path):
    """A function from limit and length of an operation to a process that is watched."""
    running = ExitStack()

    def run(limit_s, length_s, silence_s=1.0):
        watch = HeartbeatMonitor(tmp_path / heartbeat.HEARTBEAT, silence_s=silence_s)
        command = [sys.executable, "-c", PROGRAM, str(watch.path), str(limit_s), str(length_s)]
        log = tmp_path / "trainer.log"
        watched = {"after_start": watch.begin, "trouble": watch.problem}
        child = Child("trainer", lambda: command, log, **watched)
        said = []
        supervisor = Supervisor([child], said.append)
        running.enter_context(supervisor.running())

        def until(condition, seconds=120):
            give_up = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < give_up, said
                supervisor.check()
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
    assert ends(said) == [
        "trainer hangs: no sign of life for 1 s (train, for 0.3 s at most); it is ended"
    ]
    assert any("killed by signal 9" in text for text in said)


def test_a_process_that_is_stopped_is_ended(supervised):
    child, said, until = supervised(1000, 0)
    first = child.process.pid
    os.kill(first, signal.SIGSTOP)
    until(lambda: child.is_alive and child.process.pid != first)
    assert ends(said) == ["trainer hangs: no sign of life for 1 s (waiting); it is ended"]


def test_who_works_within_its_time_or_waits_is_left_alone(supervised):
    child, said, until = supervised(1000, 1.5, silence_s=5.0)
    first, enough = child.process.pid, time.monotonic() + 7
    until(lambda: time.monotonic() > enough)
    assert ends(said) == []
    assert child.process.pid == first


def test_who_has_not_begun_to_give_signs_is_not_missed(tmp_path):
    watch = HeartbeatMonitor(tmp_path / heartbeat.HEARTBEAT, silence_s=0.0)
    assert watch.problem() is None
    watch.path.write_text("waiting")
    assert watch.problem() is not None
    assert watch.problem() is None, "it is said once"


def test_a_note_is_never_seen_half_written(tmp_path):
    path = tmp_path / heartbeat.HEARTBEAT
    own = Heartbeat(path)
    own._note("waiting")
    done = threading.Event()

    def work():
        for _ in range(2000):
            with own.during("train", 1.0):
                pass
        done.set()

    threading.Thread(target=work).start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_text(encoding="utf-8"))
    assert seen <= {"waiting", "train, for 1 s at most"}


def test_a_full_disk_is_no_reason_to_stop(tmp_path):
    with Heartbeat(tmp_path / "nowhere" / heartbeat.HEARTBEAT).during("train", 1.0):
        pass
