"""Benchmark figures as JSON, with the command and the machine that made them."""

import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "flwr")


def write(name: str, figures: dict[str, Any]) -> None:
    """Write figures to benchmarks/results/NAME.json and print them."""
    content = {
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(terse=True),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        },
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def ratio_of_pairs(numerators: list[float], denominators: list[float]) -> dict[str, Any]:
    """Return the median, smallest and largest ratio of measurements taken in turns."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios), "pairs": len(ratios)}
