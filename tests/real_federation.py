"""A federation of real processes for tests: kits, TLS, keys, the gate, on loopback."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fedfora.deployment import run_state
from fedfora.deployment.flower_processes import free_port
from fedfora.deployment.provision import provision
from fedfora.deployment.settings import ProvisionArguments
from fedfora.deployment.sites_file import read_sites_file
from fedfora.deployment.supervisor import Child

BAD_SITE = Path(__file__).with_name("bad_site.py")

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") is None,
    reason="nginx is not installed, the gate: apt install nginx-light",
)

PATIENCE_S = 1200  # until a test gives up: no claim, so that a busy machine fails none
FLAGS = {
    "quantization": "none",
    "lora_rank": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_rounds": 2,
    "local_steps": 1,
    "start_deadline": 600.0,
    "round_deadline": 600.0,
}


class RealFederation:
    """Kits in a directory, and the processes started from them.

    Args:
        place: An empty directory.
        settings: Flags of the federation.
        sites: Name to each site's own flags.
        quorum: As in sites.yaml.
        address: Of the coordinator there; free ports of loopback where it is not said.
    """

    def __init__(self, place, settings, sites, quorum=1, address=None):
        self.place = place
        self.plan = {
            "federation": "clinics",
            "coordinator": address
            or {
                "host": "127.0.0.1",
                "port": free_port(),
                "superlink_port": free_port(),
            },
            "quorum": quorum,
            "settings": settings,
            "sites": sites,
        }
        self.done = self.provision()
        self.children = {}

    def provision(self, **options):
        """Write the kits, or bring them up to date with the plan."""
        path = self.place / "sites.yaml"
        path.write_text(yaml.safe_dump(self.plan, sort_keys=False))
        return provision(
            read_sites_file(path),
            ProvisionArguments(output_dir=str(self.place / "kits"), **options),
        )

    @property
    def kit(self):
        """The coordinator's kit."""
        return self.done.kit

    def site_kit(self, name):
        """Directory of a site's kit."""
        return self.place / "kits" / "sites" / name

    def coordinate(self, *words):
        """Start `fedfora coordinator run`."""
        kit = ["--kit", str(self.kit.directory)]
        return self.start("coordinator", "-m", "fedfora", "coordinator", "run", *kit, *words)

    def join(self, *names):
        """Start `fedfora site` for some sites."""
        for name in names:
            self.start(name, "-m", "fedfora", "site", "--kit", str(self.site_kit(name)))

    def join_badly(self, name, **faults):
        """Start a site whose trainer misbehaves: round number to the name of a fault."""
        chosen = json.dumps({number.removeprefix("round_"): f for number, f in faults.items()})
        self.start(name, str(BAD_SITE), "site", str(self.site_kit(name)), chosen)

    def start(self, name, *words):
        """Start a Python program that a test may look for by name."""
        child = Child(
            name, partial(list, [sys.executable, *words]), self.place / "logs" / f"{name}.log"
        )
        child.start()
        self.children[name] = child
        return child

    def end(self, name, number=signal.SIGTERM):
        """End a program and wait for it."""
        child = self.children.pop(name)
        child.process.send_signal(number)
        return child.process.wait(timeout=120)

    def stop(self):
        """End everything that was started here."""
        for child in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
        for child in self.children.values():
            try:
                child.process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                child.signal(signal.SIGKILL)
                child.process.wait()

    def wait(self, seconds=PATIENCE_S):
        """Wait for the coordinator's end, and return its exit status."""
        try:
            return self.children["coordinator"].process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end after {seconds} s\n{self.logs()}")

    def until(self, condition, seconds=PATIENCE_S):
        """Wait until something is so."""
        give_up = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > give_up:
                pytest.fail(f"it did not come to be within {seconds} s\n{self.logs()}")
            time.sleep(0.2)

    def round_reached(self, number):
        """Whether a round is over."""
        return any(event["round"] >= number for event in self.events("round"))

    def events(self, kind=None):
        """What the run has recorded."""
        run = run_state.read_run(self.kit.state)
        path = Path(run.run_config["output_dir"]) / "metrics.jsonl" if run else Path("none")
        if not path.is_file():
            return []
        lines = path.read_text().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if kind in (None, event["event"])]

    @property
    def run_directory(self):
        """Where the newest run lies."""
        return Path(run_state.read_run(self.kit.state).run_config["output_dir"])

    def reasons(self, site):
        """Round to the reason why a site was left out of it."""
        refused = self.events("rejected")
        return {event["round"]: event["reason"] for event in refused if event["site"] == site}

    def pids(self, *parts):
        """Processes whose command line has all these parts, one of them this federation's place."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode()
                if str(self.place) in line and all(part in line for part in parts):
                    found.append(int(path.parent.name))
        return found

    def kill(self, *parts):
        """Kill the processes whose command line has all these parts."""
        pids = self.pids(*parts)
        assert pids, f"no process of {parts}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def logs(self):
        """The ends of all logs, for a failure's message."""
        paths = [*self.place.glob("logs/*.log"), *self.place.glob("kits/**/logs/*.log")]
        return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in paths)


def listening(pid):
    """Ports on which a process listens."""
    sockets = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(path))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    mine = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    return [int(row[1].rpartition(":")[2], 16) for row in mine]


def assert_close(directory, adapter, *, atol):
    """The run's adapter has the same numbers."""
    found = load_file(directory / "adapter_model.safetensors")
    assert found.keys() == adapter.keys()
    assert max((found[name] - adapter[name]).abs().max() for name in adapter) < atol


def assert_same(directory, adapter):
    """The run's adapter has the same bits."""
    found = load_file(directory / "adapter_model.safetensors")
    assert found.keys() == adapter.keys()
    assert all(torch.equal(found[name], adapter[name]) for name in adapter)
