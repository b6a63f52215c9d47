"""What ends is started again and said; nothing is left behind, however the supervisor ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fedfora.deployment.supervisor import Child, Supervisor

SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]
# A supervisor in a process of its own, with a child that has a child of its own.
PROGRAM = """
import sys, time
from pathlib import Path
from fedfora.deployment.supervisor import Child, Supervisor, stoppable
grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])".format(
    "import time; time.sleep(1000)")
children = [Child("one", lambda: [sys.executable, "-c", grandchild], Path(sys.argv[1]) / "one.log")]
supervisor = Supervisor(children, lambda text: print(text, flush=True))
with stoppable(), supervisor.running():
    while True:
        time.sleep(0.05)
        supervisor.check()
"""


def until(condition, seconds=120):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_what_is_killed_is_started_again_after_longer_and_longer_pauses(tmp_path):
    said = []
    child = Child("worker", lambda: SLEEP, tmp_path / "worker.log")
    supervisor = Supervisor([child], said.append)
    with supervisor.running():
        for pause_s in (1, 2):
            first = child.process.pid
            os.kill(first, signal.SIGKILL)
            until(lambda: child.process.poll() is not None)
            supervisor.check()
            assert f"worker ended (killed by signal 9); restarting it in {pause_s} s" in said[-1]
            supervisor.check()
            assert child.process is None, "not before its pause is over"
            child.due = 0.0
            supervisor.check()
            assert child.is_alive
            assert child.process.pid != first
            assert said[-1] == "worker started again"
        last = child.process.pid
    assert not alive(last)


def test_the_pause_is_short_again_for_who_has_lasted(tmp_path):
    child = Child("worker", lambda: SLEEP, tmp_path / "worker.log")
    supervisor = Supervisor([child], lambda text: None)
    with supervisor.running():
        child.pause_s, child.started = 8.0, child.started - 1000
        os.kill(child.process.pid, signal.SIGKILL)
        until(lambda: child.process.poll() is not None)
        supervisor.check()
        assert child.pause_s == 2.0


def test_who_does_not_heed_the_request_to_end_is_made_to(tmp_path, monkeypatch):
    monkeypatch.setattr("fedfora.deployment.supervisor.STOPPING_S", 0.5)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
    deaf += "time.sleep(99)"
    log = tmp_path / "deaf.log"
    child = Child("deaf", lambda: [sys.executable, "-c", deaf], log)
    with Supervisor([child], lambda text: None).running():
        until(lambda: log.read_text() == "1\n")
        pid = child.process.pid
    assert not alive(pid)


def test_a_log_is_for_its_owner_alone(tmp_path):
    child = Child("worker", lambda: SLEEP, tmp_path / "logs" / "worker.log")
    with Supervisor([child], lambda text: None).running():
        assert oct((tmp_path / "logs" / "worker.log").stat().st_mode & 0o777) == "0o600"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells only on Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind_however_the_supervisor_ends(tmp_path, number):
    """By SIGKILL, the direct child at least; Flower's processes look after their own."""
    done = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with done:
        assert done.stdout.readline() == "one started\n"
        (child,) = children_of(done.pid)
        until(lambda: children_of(child))
        (grandchild,) = children_of(child)
        done.send_signal(number)
        done.wait(timeout=120)
    until(lambda: not alive(child))
    if number == signal.SIGKILL:
        os.kill(grandchild, signal.SIGKILL)
    until(lambda: not alive(grandchild))
    assert done.returncode == (-number if number == signal.SIGKILL else 0)


def children_of(pid):
    path = f"/proc/{pid}/task/{pid}/children"
    with open(path) as file:
        return [int(word) for word in file.read().split()]


# A process that waits without a limit ends with the one that started it.


WAITS = """
import signal, sys, threading
from fedfora.deployment.supervisor import exit_with_parent
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
exit_with_parent()
print("waits", flush=True)
threading.Event().wait()
"""
STARTS = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WAITS!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_process_that_waits_for_ever_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        time.sleep(0.3)
        assert os.path.exists(f"/proc/{child}")
        parent.kill()
        parent.wait()
        give_up = time.monotonic() + 120
        while _runs(child) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert not _runs(child)
    finally:
        parent.stdout.close()
        if _runs(child):
            os.kill(child, signal.SIGKILL)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
