"""Many real sites on one machine, one of them killed in each round: do all rounds come to an end?

Each site is what a hospital would run: its daemon, a resident trainer and a SuperNode, started from
its kit, behind the gate; the base is a tiny one. As soon as a round is recorded, the next site's
daemon is killed with SIGKILL, its processes with it, and started again.

    OMP_NUM_THREADS=1 python benchmarks/deployment_many.py
"""

import argparse
import json
import signal
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedfora.deployment import run_state
from fedfora.deployment.flower_processes import free_port
from fedfora.deployment.provision import Provisioned, provision
from fedfora.deployment.rehearse import processes
from fedfora.deployment.settings import ProvisionArguments
from fedfora.deployment.sites_file import read_sites_file
from fedfora.models.resolve import model_path
from record import write

LOOK_S = 5.0  # between two looks at the memory


def tiny_base(directory: Path) -> str:
    """Write a base of some ten thousand numbers and return its directory."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("clinic-base"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def plan(place: Path, options: argparse.Namespace) -> Path:
    """Write a sites.yaml and return its path."""
    own = {"train_file": "clinic:test", "model_name_or_path": tiny_base(place / "base")}
    content = {
        "federation": "many",
        "coordinator": {
            "host": "127.0.0.1",
            "port": free_port(),
            "superlink_port": free_port(),
        },
        "quorum": options.sites // 2,
        "settings": {
            "num_rounds": options.rounds,
            "lora_rank": 2,
            "local_steps": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "quantization": "none",
            "start_deadline": options.start,
            "round_deadline": options.deadline,
        },
        "sites": {f"site-{i:02d}": own for i in range(options.sites)},
    }
    path = place / "sites.yaml"
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign, assignment]
    path.write_text(yaml.dump(content, Dumper=dumper, sort_keys=False))
    return path


@dataclass
class Peak:
    """Largest memory of all processes at one time, in MiB; shared pages are counted once."""

    mib: float = 0.0
    processes: int = 0

    def look(self, place: Path) -> None:
        """Look at the processes that were started from a place."""
        sizes = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                started_from = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
                if str(place).encode() in started_from:
                    rollup = (path / "smaps_rollup").read_text()
                    sizes.append(int(rollup.split("Pss:")[1].split()[0]) / 1024)
            except (OSError, IndexError):
                continue  # it has just ended
        if sum(sizes) > self.mib:
            self.mib, self.processes = sum(sizes), len(sizes)


def run(done: Provisioned, timeout: float, peak: Peak) -> tuple[int | None, list[str]]:
    """Run the federation, kill a site in each round; return its exit status and the killed."""
    killed: list[str] = []
    looked = 0.0
    with processes(done, lambda text: None) as supervisor:
        coordinator, *sites = supervisor.children
        give_up = time.monotonic() + timeout
        while coordinator.is_alive and time.monotonic() < give_up:
            if len(rounds_of(done)) > len(killed):
                site = sites[len(killed) % len(sites)]
                site.signal(signal.SIGKILL)
                killed.append(site.name)
            for site in sites:
                if not site.is_alive:
                    site.start()
            if time.monotonic() - looked > LOOK_S:
                peak.look(done.place)
                looked = time.monotonic()
            time.sleep(0.5)
        assert coordinator.process is not None
        return coordinator.process.poll(), killed


def rounds_of(done: Provisioned) -> list[dict[str, Any]]:
    """Return the rounds that the run has recorded until now."""
    found = run_state.read_run(done.kit.state)
    path = Path(str(found.run_config["output_dir"])) / "metrics.jsonl" if found else None
    if path is None or not path.is_file():
        return []
    events = [
        json.loads(line) for line in path.read_text().splitlines(keepends=True) if "\n" in line
    ]
    return [event for event in events if event["event"] == "round"]


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--start", type=float, default=300.0)
    parser.add_argument("--deadline", type=float, default=60.0)
    parser.add_argument("--timeout", type=float, default=3600.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedfora-many-") as name:
        place = ProvisionArguments(output_dir=str(Path(name) / "kits"))
        done = provision(read_sites_file(plan(Path(name), options)), place)
        peak = Peak()
        status, killed = run(done, options.timeout, peak)
        rounds = rounds_of(done)
        marks = [event["seconds"] for event in rounds]
        seconds = [after - before for before, after in pairwise(marks)]
        figures = {
            "sites": options.sites,
            "rounds_asked": options.rounds,
            "rounds_completed": len(rounds),
            "exit_status": status,
            "killed": len(killed),
            "sites_in_each_round": [len(event["sites"]) for event in rounds],
            "seconds_per_round": median(seconds) if seconds else None,
            "round_deadline_s": options.deadline,
            "peak_memory_mib": round(peak.mib),
            "processes_then": peak.processes,
        }
    write("deployment_many", figures)


if __name__ == "__main__":
    main()
