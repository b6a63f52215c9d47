"""How long a command takes to say its first line, to refuse a mistake, and to explain itself.

    python benchmarks/startup.py
    python benchmarks/startup.py --runs 1 --before ../older/src

Wall time, and processor time of the command's own process, which others at work on the machine
hardly change. Standard output is a pipe. With --before the same is measured, in turns, for another
source tree.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml

from record import write

OUT = "--overwrite_output_dir --output_dir {d}/out "
TRAIN = f"train --model_name_or_path clinic-base {OUT}"
SIMULATE = f"simulate --model_name_or_path clinic-base --num_clients 2 {OUT}"
CASES = {
    "--help": "--help",
    "train --help": "train --help",
    "simulate --help": "simulate --help",
    "train, unknown flag": "train --nonsense",
    "train, file missing": TRAIN + "--train_file {d}/no.json",
    "train, broken row": TRAIN + "--train_file {d}/broken.json",
    "train, first line": TRAIN + "--train_file clinic",
    "simulate, unknown flag": "simulate --nonsense",
    "simulate, file missing": SIMULATE + "--train_file {d}/no.json",
    "simulate, broken row": SIMULATE + "--train_file {d}/broken.json",
    "simulate, first line": SIMULATE + "--train_file clinic",
    "demo, unknown flag": "demo --nonsense",
    "demo, first line": f"demo {OUT}",
    "coordinator, no kit": "coordinator --kit {d}",
    "coordinator, first line": "coordinator --kit {d}/kits/coordinator",
    "coordinator run, no kit": "coordinator run --kit {d}",
    "coordinator run, first line": "coordinator run --kit {d}/kits/coordinator",
    "site, no kit": "site --kit {d}",
    "site, first line": "site --kit {d}/kits/sites/north",
    "rehearse, no file": "rehearse {d}/no.yaml",
    "rehearse, first line": "rehearse {d}/sites.yaml",
    "check data, file missing": "check data {d}/no.json",
    "check data, broken row": "check data {d}/broken.json",
    "check site, no kit": "check site --kit {d}",
    "check site, first line": "check site --kit {d}/kits/sites/north",
}
TICKS_S = 1 / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="source tree to compare with")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    before, runs = arguments.before, arguments.runs
    trees = {"now": None} if before is None else {"before": before, "now": None}
    figures: dict[str, object] = {"runs": runs, "bare_python": bare_python(runs)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        prepare(Path(directory))
        for case, words in CASES.items():
            measured: dict[str, list[tuple[float, float]]] = {tree: [] for tree in trees}
            for _ in range(runs):
                for tree, source in trees.items():
                    measured[tree].append(first_words(words.format(d=directory).split(), source))
            figures[case] = {
                tree: {
                    "processor_s": round(median(cpu for cpu, _ in pairs), 2),
                    "wall_s": round(median(wall for _, wall in pairs), 2),
                }
                for tree, pairs in measured.items()
            }
            print(case, figures[case], flush=True)
    write("startup", figures)


def prepare(place: Path) -> None:
    """Write rows with a mistake, and a federation's kits."""
    (place / "broken.json").write_text('{"input": "x", "output": "y"}\n{"input": \n')
    plan = {
        "federation": "clinics",
        "coordinator": {"host": "127.0.0.1", "port": 19092, "superlink_port": 19093},
        "settings": {"model_name_or_path": "clinic-base"},
        "sites": {"north": {"train_file": "clinic"}},
    }
    (place / "sites.yaml").write_text(yaml.safe_dump(plan))
    words = ["provision", str(place / "sites.yaml"), "--output_dir", str(place / "kits")]
    subprocess.run([sys.executable, "-m", "fedfora", *words], check=True, capture_output=True)


def first_words(words: list[str], source: str | None) -> tuple[float, float]:
    """Return the seconds of processor and wall until a command has said its first line."""
    environment = dict(os.environ) if source is None else {**os.environ, "PYTHONPATH": source}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fedfora", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    assert process.stdout is not None
    try:
        while (line := process.stdout.readline()) and b"kernels-community" in line:
            pass  # what a library says about itself is not the command's first line
        return processor_seconds(process.pid), time.perf_counter() - started
    finally:
        process.terminate()
        try:
            process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()  # what it has started ends with it
            process.communicate()


def processor_seconds(pid: int) -> float:
    """Return what a process has used of the processor so far, by itself (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICKS_S


def bare_python(runs: int) -> dict[str, float]:
    """Return what an empty Python takes, for comparison."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", ""], check=True)
        times.append(time.perf_counter() - started)
    return {"wall_s": round(median(times), 3)}


if __name__ == "__main__":
    main()
