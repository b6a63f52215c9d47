"""Starts the parties of a FATE federation as processes, and makes sure that all of them end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent


@dataclass
class Ended:
    """A party's process after its end."""

    status: int
    output: str
    seconds: float
    directory: Path

    def state(self, what, round_number):
        return load_file(self.directory / "dump" / f"{what}-{round_number}.safetensors")


@pytest.fixture(scope="session")
def federate():
    """A function that runs all parties to their end.

    It takes a new directory, flags for all, flags for one party by its name, which parties die
    after which round, and which program a party is. It returns what became of each, by name.
    """

    def run(
        directory,
        flags,
        own_flags=None,
        *,
        parties,
        die_after_round=None,
        worker="party_worker.py",
        patience_s=300,
    ):
        started = time.monotonic()
        processes = {}
        for name in parties:
            role, party_id = name.split(":")
            home = directory / name.replace(":", "-")
            home.mkdir(parents=True)
            words = {
                "role": role,
                "party_id": party_id,
                "parties": parties,
                "session_id": "test",
                "message_dir": directory / "messages",
                "output_dir": home / "out",
                **flags,
                **(own_flags or {}).get(name, {}),
            }
            dies = (die_after_round or {}).get(name, 0)
            command = [sys.executable, HERE / worker, home / "dump", dies]
            for key, value in words.items():
                many = value if isinstance(value, list) else [value]
                command += [f"--{key}", *many]
            with (home / "log").open("w") as log:
                processes[name] = subprocess.Popen(
                    [str(word) for word in command],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        ended = {}
        try:
            for name, process in processes.items():
                left = patience_s - (time.monotonic() - started)
                status = process.wait(timeout=max(left, 1))
                home = directory / name.replace(":", "-")
                seconds = time.monotonic() - started
                ended[name] = Ended(status, (home / "log").read_text(), seconds, home)
        finally:
            for process in processes.values():
                kill_group(process)
        return ended

    return run


def kill_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
