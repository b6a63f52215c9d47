"""What a real federation costs beyond its training: time, bytes and memory, on loopback.

Two sites with an adapter of 19 MB on the bundled model, behind the gate, with TLS and keys. A
round's overhead is its wall time less that of its slowest site's training. Bytes are what the gate
counted, heartbeats and polling included. A trainer is cold when its process starts, warm when base
and rows are loaded; the figure is the time to the answer of a message, less the training in it.

    OMP_NUM_THREADS=1 python benchmarks/deployment.py
"""

import argparse
import json
import re
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from flwr.app import ConfigRecord, RecordDict

from fedfora.deployment import run_state
from fedfora.deployment.client_app import ask
from fedfora.deployment.flower_processes import free_port
from fedfora.deployment.journal import RUN_NAME
from fedfora.deployment.kit import SiteKit, read_kit
from fedfora.deployment.provision import Provisioned, provision
from fedfora.deployment.rehearse import processes
from fedfora.deployment.settings import ProvisionArguments
from fedfora.deployment.site import children
from fedfora.deployment.sites_file import read_sites_file
from fedfora.deployment.supervisor import Supervisor
from record import write

RANK = 268  # 4.8 million numbers, 19 MB, on the bundled model
SITES = ("cardiology", "dermatology")
PROCESSES = {  # name to a part of its command line
    "trainer": "fedfora.deployment.site",
    "SuperNode": "flower_processes supernode",
    "SuperExec": "flower-superexec",
    "client process, of one message": "flower_processes clientapp",
    "SuperLink": "flower-superlink",
    "ServerApp": "flwr-serverapp",
    "fedfora site": "-m fedfora site",
    "fedfora coordinator": "-m fedfora coordinator",
}


def plan(place: Path, num_rounds: int, rank: int) -> Path:
    """Write a sites.yaml and return its path."""
    own = {"train_file": "clinic", "model_name_or_path": "clinic-base"}
    path = place / "sites.yaml"
    address = {"host": "127.0.0.1", "port": free_port(), "superlink_port": free_port()}
    content = {
        "federation": "bench",
        "coordinator": address,
        "quorum": len(SITES),
        "settings": {
            "num_rounds": num_rounds,
            "lora_rank": rank,
            "local_steps": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "quantization": "none",
            "warmup_ratio": 0.0,  # a step of rate 0 changes nothing: equal updates are sent once
        },
        "sites": dict.fromkeys(SITES, own),
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=False))
    return path


def watch(done: Provisioned, seconds: float) -> dict[str, int]:
    """Run the federation to its end; return the largest resident memory of each kind of process."""
    peaks: dict[str, int] = {}
    with processes(done, lambda text: None) as supervisor:
        coordinator = supervisor.children[0]
        give_up = time.monotonic() + seconds
        while coordinator.is_alive and time.monotonic() < give_up:
            for name, peak in memory_of(str(done.place)).items():
                peaks[name] = max(peaks.get(name, 0), peak)
            time.sleep(0.3)
        assert coordinator.process is not None
        assert coordinator.process.poll() == 0, (done.place / "logs/coordinator.log").read_text()
    return peaks


def memory_of(place: str) -> dict[str, int]:
    """Return the high-water mark of resident bytes of the processes of a place, by kind."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (path / "environ").read_bytes().decode(errors="replace")
            status = (path / "status").read_text()
        except OSError:
            continue
        if place in line or place in environment:
            lines[line] = int(re.search(r"VmHWM:\s+(\d+)", status + "VmHWM: 0")[1]) * 1024  # type: ignore[index]
    found: dict[str, int] = {}
    for line, peak in lines.items():
        for name, part in PROCESSES.items():
            if part in line:
                found[name] = max(found.get(name, 0), peak)
    return found


def rounds_of(done: Provisioned) -> list[dict[str, Any]]:
    """Return the rounds that the run recorded."""
    run = run_state.read_run(done.kit.state)
    assert run is not None
    path = Path(str(run.run_config["output_dir"])) / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [event for event in events if event["event"] == "round"]


def overheads(rounds: list[dict[str, Any]]) -> list[float]:
    """Return the seconds of each round but the first, less those of the slowest training in it."""
    return [
        after["seconds"] - before["seconds"] - max(site["seconds"] for site in after["sites"])
        for before, after in pairwise(rounds)
    ]


def through_the_gate(done: Provisioned) -> tuple[int, int]:
    """Return the bytes that came up to the coordinator, and that went down, in the whole run."""
    up = down = 0
    for text in (done.kit.state / "gate.log").read_text().splitlines():
        line = json.loads(text)
        up, down = up + line["received"], down + line["sent"]
    return up, down


def starts(done: Provisioned) -> dict[str, float]:
    """Return the seconds to the first training of a cold and of a warm trainer."""
    kit = read_kit(done.place / "sites" / SITES[0], SiteKit)
    (kit.state / "last-run.json").unlink()
    run = run_state.read_run(done.kit.state)
    assert run is not None
    shared = {k: v for k, v in run.run_config.items() if k not in ("output_dir", "resume")}
    shared = {k: v for k, v in shared.items() if k in ("num_rounds", "lora_rank", "local_steps")}
    shared |= {"quantization": "none", "per_device_train_batch_size": 1}
    head = {"run": 1, "settings": {**shared, RUN_NAME: "bench/starts"}}
    question = RecordDict({"ask": ConfigRecord({"adapter": True})})
    trainer = children(kit)[0]
    found = {}
    with Supervisor([trainer], lambda text: None).running():
        for name in ("cold", "warm"):
            started = time.monotonic()
            asked = {**head, "operation": "describe"}
            _, described = ask(kit.state, asked, question, connect_s=300)
            config = {"round-index": 0, "rule": "fedavg", "rank": RANK, "frozen-digest": ""}
            task = RecordDict({"arrays": described["fresh"], "config": ConfigRecord(config)})
            answer, reply = ask(kit.state, {**head, "operation": "train"}, task)
            assert not answer, answer
            trained = float(reply["metrics"]["seconds"])
            found[name] = time.monotonic() - started - trained
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--timeout", type=float, default=900.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedfora-bench-") as name:
        place = Path(name)
        path = plan(place, arguments.rounds, arguments.rank)
        done = provision(read_sites_file(path), ProvisionArguments(output_dir=str(place / "kits")))
        peaks = watch(done, arguments.timeout)
        rounds = rounds_of(done)
        up, down = through_the_gate(done)
        payload = sum(site["uplink_bytes"] for event in rounds for site in event["sites"])
        sent = sum(site["downlink_bytes"] for event in rounds for site in event["sites"])
        first = rounds[0]["sites"][0]["uplink_bytes"]  # one site sends the fresh adapter, once
        seconds = overheads(rounds)
        figures = {
            "sites": len(SITES),
            "rounds": len(rounds),
            "adapter_bytes": first,
            "seconds_beyond_training": {
                "median": median(seconds),
                "min": min(seconds),
                "max": max(seconds),
            },
            "bytes_up_over_payload": up / (payload + first),
            "bytes_down_over_payload": down / sent,
            "peak_resident_mib": {k: round(v / 2**20) for k, v in sorted(peaks.items())},
            "seconds_to_first_training": starts(done),
        }
    write("deployment", figures)


if __name__ == "__main__":
    main()
