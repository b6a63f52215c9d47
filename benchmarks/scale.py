"""How a round's time and memory grow with the number of clients, on the embedded engine.

Each line is a process of its own, on a tiny random base so that what is measured is the federation:
10, 100, 1,000 and 10,000 clients with at most 20 of them in a round, and 10 or 1,000 clients all in
one round. A client takes one step on one row. Seconds are a round's median, from the first client's
step to the checkpoint; those of the processor are disturbed little by other programs. Peak memory
is the process's; `flat` is that of 1,000 clients in one round over that of 10.

    OMP_NUM_THREADS=1 python benchmarks/scale.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedfora.cli.console import silence_libraries
from fedfora.data.clinic import clinic_rows
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import simulate
from fedfora.models.resolve import model_path
from fedfora.reporting.record import peak_memory_bytes
from fedfora.reporting.view import View
from record import write

PER_ROUND = 20
SAMPLED = (10, 100, 1_000, 10_000)
TOGETHER = (10, 1_000)
RULES = ("fedavg", "core")


class Clock(View):
    """Notes when rounds begin (their first step) and end (their line), on two clocks."""

    def __init__(self) -> None:
        super().__init__(1, Console(quiet=True))
        self.made, self.begun, self.ended = now(), [], []

    def advance(self, *args: Any, **kwargs: Any) -> None:
        """A step: the first one after a line begins a round."""
        if len(self.begun) == len(self.ended):
            self.begun.append(now())

    def line(self, text: str) -> None:
        """A round is over."""
        self.ended.append(now())


def now() -> Any:
    """Return wall and processor time, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def make_world(directory: Path, num_rows: int) -> None:
    """Write a random Llama of 20 thousand parameters, and rows to share out."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("clinic-base"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    known = clinic_rows()
    with (directory / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            file.write(json.dumps(known[number % len(known)]) + "\n")


def run_one(num_clients: int, in_round: int, rounds: int, rule: str) -> dict[str, Any]:
    """Run one federation in this process."""
    silence_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        make_world(Path(scratch), num_clients)
        settings = from_run_config(
            {
                "model_name_or_path": f"{scratch}/base",
                "quantization": "none",
                "train_file": f"{scratch}/rows.jsonl",
                "partition": "iid",
                "num_clients": num_clients,
                "clients_per_round": in_round,
                "num_rounds": rounds,
                "local_steps": 1,
                "lora_rank": 8,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "aggregation": rule,
                "output_dir": f"{scratch}/out",
            }
        )
        clock = Clock()
        simulate(settings, clock)
    elapsed = [after - before for before, after in zip(clock.begun, clock.ended, strict=True)]
    wall_s, processor_s = zip(*map(tuple, elapsed), strict=True)
    return {
        "rule": rule,
        "clients": num_clients,
        "in_a_round": in_round,
        "rounds": rounds,
        "seconds_per_round": median(wall_s),
        "processor_seconds_per_round": median(processor_s),
        "processor_seconds_to_open_and_agree": float(clock.begun[0][1] - clock.made[1]),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def in_a_process(num_clients: int, in_round: int, rounds: int, rule: str) -> dict[str, Any]:
    """Run one federation in a process of its own."""
    words = [sys.executable, __file__, "--one", rule, *map(str, (num_clients, in_round, rounds))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(line), file=sys.stderr)
    return line


def main() -> None:
    """Run all lines and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("RULE", "CLIENTS", "IN_ROUND", "ROUNDS"))
    parser.add_argument("--at_once", type=int, default=1, help="processes at a time")
    options = parser.parse_args()
    if options.one:
        rule, *numbers = options.one
        print(json.dumps(run_one(*map(int, numbers), rule)))
        return
    lines = [(clients, min(PER_ROUND, clients), 3, "fedavg") for clients in SAMPLED]
    lines += [(clients, clients, 1, rule) for rule in RULES for clients in TOGETHER]
    with ThreadPoolExecutor(options.at_once) as pool:
        figures = list(pool.map(lambda line: in_a_process(*line), lines))
    sampled, together = figures[: len(SAMPLED)], figures[len(SAMPLED) :]
    flat = {
        rule: large["peak_memory_bytes"] / small["peak_memory_bytes"]
        for rule, small, large in zip(RULES, together[::2], together[1::2], strict=True)
    }
    results = {"sampled": sampled, "all_in_one_round": together, "flat": flat}
    write("scale", {"processes_at_once": options.at_once, **results})


if __name__ == "__main__":
    main()
