"""What simulating a federation costs beyond its training steps, in time and in memory.

Time: 100 clients x 10 local steps against a plain PyTorch loop of the same 1,000 steps on the same
model and rows, in turns in one process. Memory: the peak of a process that simulates 100 clients
against one that simulates 1, each with the same number of steps in all.

    OMP_NUM_THREADS=1 python benchmarks/simulation.py
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import DataCollatorForSeq2Seq

from fedfora.cli.console import silence_libraries
from fedfora.federated.settings import FederationSettings, from_run_config
from fedfora.federated.simulation import simulate
from fedfora.federated.site_runtime import load_runtime, open_site
from fedfora.reporting.record import peak_memory_bytes
from fedfora.reporting.view import View
from record import ratio_of_pairs, write

SILENT = View(1, Console(quiet=True))
LOCAL_STEPS = 10
BATCH = 8


def settings(num_clients: int, num_rounds: int, quantization: str, out: str) -> FederationSettings:
    """A federation on the bundled model and notes."""
    return from_run_config(
        {
            "model_name_or_path": "clinic-base",
            "quantization": quantization,
            "train_file": "clinic",
            "partition": "iid",
            "num_clients": num_clients,
            "num_rounds": num_rounds,
            "local_steps": LOCAL_STEPS,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "output_dir": out,
            "overwrite_output_dir": True,
        }
    )


def plain_loop(run: FederationSettings, num_steps: int) -> None:
    """The same model, rows, batches and optimizer, written by hand."""
    runtime = load_runtime(run.run_config())
    rows = [
        row for i in range(run.federation.num_clients or 1) for row in open_site(runtime, i).encoded
    ]
    collate = DataCollatorForSeq2Seq(runtime.base.tokenizer, label_pad_token_id=-100)
    model = runtime.model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for step in range(num_steps):
        start = step * BATCH % (len(rows) - BATCH)
        model(**collate(rows[start : start + BATCH])).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def measure_time(num_clients: int, pairs: int, quantization: str) -> dict[str, Any]:
    """Return the ratio of a simulation's time to the plain loop's, on two clocks."""
    with tempfile.TemporaryDirectory() as out:
        run = settings(num_clients, 1, quantization, out)
        simulate(settings(2, 1, quantization, out), SILENT)  # imports and first calls
        open_site(load_runtime(run.run_config()), 0)
        simulated, plain = [], []
        for _ in range(pairs):
            simulated.append(seconds_of(lambda: simulate(run, SILENT)))
            plain.append(seconds_of(lambda: plain_loop(run, num_clients * LOCAL_STEPS)))
    return {
        clock: {
            "simulated_s": [pair[i] for pair in simulated],
            "plain_s": [pair[i] for pair in plain],
            "ratio": ratio_of_pairs([p[i] for p in simulated], [p[i] for p in plain]),
        }
        for i, clock in enumerate(("wall", "processor"))
    }


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor seconds; other programs disturb the second ones little."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def measure_memory(num_clients: int, quantization: str) -> int:
    """Return the peak memory of a fresh process that simulates so many clients, 100 in all."""
    words = [
        sys.executable,
        __file__,
        "--memory_of",
        str(num_clients),
        "--quantization",
        quantization,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Run both and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--num_clients", type=int, default=100)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--memory_of", type=int)
    options = parser.parse_args()
    silence_libraries()
    if options.memory_of:
        rounds = max(1, options.num_clients // options.memory_of)
        with tempfile.TemporaryDirectory() as out:
            simulate(settings(options.memory_of, rounds, options.quantization, out), SILENT)
        print(peak_memory_bytes())
        return
    memory = {n: measure_memory(n, options.quantization) for n in (1, options.num_clients)}
    figures = {
        "clients": options.num_clients,
        "local_steps": LOCAL_STEPS,
        "batch": BATCH,
        "quantization": options.quantization,
        "time": measure_time(options.num_clients, options.pairs, options.quantization),
        "peak_memory_bytes": memory,
        "memory_ratio": memory[options.num_clients] / memory[1],
    }
    write("simulation", figures)


if __name__ == "__main__":
    main()
