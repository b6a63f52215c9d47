"""How long `fedfora --help` takes, and what a subcommand's help takes.

python benchmarks/startup.py
"""

import subprocess
import sys
import time
from statistics import median

from record import write

RUNS = 9


def seconds(*words: str) -> float:
    """Return the median wall time of `python -m fedfora WORDS`."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fedfora", *words], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return median(times)


def main() -> None:
    """Measure and write."""
    figures = {
        "runs": RUNS,
        "help_s": seconds("--help"),
        "bare_python_s": bare_python(),
        "simulate_help_s": seconds("simulate", "--help"),
        "train_help_s": seconds("train", "--help"),
    }
    write("startup", figures)


def bare_python() -> float:
    """Return what an empty Python takes, for comparison."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", ""], check=True)
        times.append(time.perf_counter() - started)
    return median(times)


if __name__ == "__main__":
    main()
