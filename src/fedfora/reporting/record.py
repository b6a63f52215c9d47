"""A run directory: what was run, where, and what came out, written as it happens.

`config.yaml` holds the resolved settings, `environment.json` versions and hardware,
`metrics.jsonl` one line per event. Files appear whole or not at all: they are written beside their
place and renamed.
"""

import json
import os
import platform
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

PACKAGES = ("fedfora", "torch", "transformers", "peft", "bitsandbytes", "flwr")


class RunRecord:
    """Writes one run directory."""

    def __init__(self, output_dir: str | Path, *, overwrite: bool) -> None:
        """Make the directory.

        Raises:
            ValueError: If it holds another run and `overwrite` is false, or cannot be written.
        """
        check_output_dir(output_dir, overwrite=overwrite)
        self.directory = Path(output_dir)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "config.yaml").unlink(missing_ok=True)  # an earlier run ends here
            (self.directory / "metrics.jsonl").write_text("")
        except OSError as error:
            raise ValueError(f"--output_dir {output_dir} cannot be written: {error}") from error
        self._started = time.time()

    @classmethod
    def reopened(cls, output_dir: str | Path, metrics_bytes: int) -> "RunRecord":
        """Return the record of a run that is gone on with.

        Args:
            output_dir: Its directory.
            metrics_bytes: How much of metrics.jsonl is kept; what came later will come again.
        """
        record = cls.__new__(cls)
        record.directory = Path(output_dir)
        with (record.directory / "metrics.jsonl").open("ab") as file:
            file.truncate(metrics_bytes)
        record._started = time.time()
        return record

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl."""
        return (self.directory / "metrics.jsonl").stat().st_size

    def write_config(self, settings: dict[str, Any]) -> None:
        """Write the resolved settings."""
        write_text(self.directory / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    def write_environment(self, **facts: Any) -> None:
        """Write versions, hardware and the given facts, e.g. seed and fingerprints."""
        self.write_json("environment.json", {**environment(), **facts})

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file into the run directory."""
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_text(self.directory / name, text + "\n")

    def log(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        line = {"event": event, "seconds": round(time.time() - self._started, 3), **values}
        with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def check_output_dir(output_dir: str | Path, *, overwrite: bool) -> None:
    """Raise if a run could not be written there.

    Raises:
        ValueError: If the directory holds another run and `overwrite` is false, or is no directory.
    """
    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output_dir {output_dir} is not a directory")
    if (directory / "config.yaml").exists() and not overwrite:
        raise ValueError(f"--output_dir {output_dir} holds another run (--overwrite_output_dir)")


def check_writable(output_dir: str | Path, *, num_bytes: int = 0) -> None:
    """Raise if nothing could be written there, without writing anything.

    Args:
        output_dir: A directory, or one that would be made.
        num_bytes: About how much will be written.

    Raises:
        ValueError: If the place is read-only, no directory, or the disk too full.
    """
    place = Path(output_dir).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--output_dir {output_dir}: {place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {output_dir}: {place} cannot be written to")
    if (free := shutil.disk_usage(place).free) < num_bytes:
        raise ValueError(
            f"--output_dir {output_dir}: the disk has {free / 2**20:,.0f} MiB left, about "
            f"{num_bytes / 2**20:,.0f} MiB will be written"
        )


def environment() -> dict[str, Any]:
    """Return versions and hardware."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "gpus": _gpus(),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # a report alone need not load it
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
