"""A process that waits without a limit ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time

import pytest

WAITS = """
import signal, sys, threading
from fedfora.deployment.parent import exit_with_parent
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
exit_with_parent(0.05)
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
        give_up = time.monotonic() + 30
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
