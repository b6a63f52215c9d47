"""A run directory: what was run, where, and what came out, written as it happens.

`config.yaml` holds the resolved settings, `environment.json` versions and hardware,
`metrics.jsonl` one line per event, `round.jsonl` what passes in the round that is on. Listeners in
the same process hear every event: the terminal's view, trackers. Other files appear whole or not at
all: they are written beside their place and renamed.
"""

import json
import os
import platform
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedfora.config import flag
from fedfora.files import write_atomically
from fedfora.registry import installed_version

PACKAGES = ("fedfora", "torch", "transformers", "peft", "bitsandbytes", "flwr")

METRICS, PASSING = "metrics.jsonl", "round.jsonl"

Event = dict[str, Any]
Listener = Callable[[Event], None]

# What is written at the end; what an earlier run left would pass for this run's.
RESULTS = ("card.json", "report.html", "summary.json", "predictions.jsonl")

# What a run writes over, beside its own record; as patterns.
_FILES = ("adapter_*", "fedfora.json", "README.md", "environment.json", *RESULTS)

# The directories that a run makes and removes again, and a file that only fedfora puts there.
_MARKS = {
    "checkpoint-[0-9]*": ("progress.json", "fedfora.json"),
    "round-[0-9]*": ("state.json",),
    "best": ("round.json",),
    "sites/*": ("adapter/fedfora.json", "after-*.safetensors*"),
}


@dataclass
class RunArguments:
    """Output."""

    output_dir: str = flag("out", "run directory: adapter, metrics, configuration", often=True)
    overwrite_output_dir: bool = flag(False, "write over an earlier run in output_dir", often=True)


class RunRecord:
    """Writes one run directory."""

    def __init__(
        self,
        output_dir: str | Path,
        *,
        overwrite: bool,
        listeners: Iterable[Listener] = (),
        kept_bytes: int | None = None,
    ) -> None:
        """Make the directory, or open that of a run that is resumed.

        Args:
            output_dir: The directory.
            overwrite: Whether it may take the place of another run's.
            listeners: Called with every event.
            kept_bytes: Of a run that is resumed, how much of metrics.jsonl is kept; what came later
                will come again.

        Raises:
            ValueError: If it holds another run and `overwrite` is false, or cannot be written.
        """
        self.directory, self.listeners = Path(output_dir), list(listeners)
        self._started = time.time()
        if kept_bytes is not None:
            with (self.directory / METRICS).open("ab") as file:
                file.truncate(kept_bytes)
            lines = (self.directory / METRICS).read_text(encoding="utf-8").splitlines()
            self._started -= max([json.loads(line).get("seconds", 0) for line in lines], default=0)
            return
        check_output_dir(output_dir, overwrite=overwrite)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in ("config.yaml", *RESULTS):  # an earlier run ends here
                (self.directory / name).unlink(missing_ok=True)
            self.no_round()
            (self.directory / METRICS).write_text("")
        except OSError as error:
            raise ValueError(f"--output_dir {output_dir} cannot be written: {error}") from error

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl."""
        return (self.directory / METRICS).stat().st_size

    def write_config(
        self, settings: dict[str, dict[str, Any]], without: Collection[str] = ()
    ) -> None:
        """Write the resolved settings by section, without those that have no effect in this run."""
        effective = {
            section: {name: value for name, value in values.items() if name not in without}
            for section, values in settings.items()
        }
        write_text(self.directory / "config.yaml", yaml.safe_dump(effective, sort_keys=False))

    def write_environment(self, **facts: Any) -> None:
        """Write versions, hardware and the given facts, e.g. seed and fingerprints."""
        self.write_json("environment.json", {**environment(), "command": command(), **facts})

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file into the run directory."""
        write_json(self.directory / name, content)

    def log(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl and tell the listeners."""
        self.tell(append_event(self.directory, event, **{"seconds": self.seconds(), **values}))

    def announce(self, event: str, **values: Any) -> None:
        """Tell of what passes by: listeners and watchers hear it, metrics.jsonl keeps it not."""
        self.tell(append_event(self.directory, event, file=PASSING, **values))

    def tell(self, event: Event) -> None:
        """Call the listeners only."""
        for listener in self.listeners:
            listener(event)

    def no_round(self) -> None:
        """Forget what passed in the last round."""
        (self.directory / PASSING).unlink(missing_ok=True)

    def seconds(self) -> float:
        """Return the time since the run began, without that between a stop and a resumption."""
        return round(time.time() - self._started, 3)


def append_event(directory: Path, event: str, *, file: str = METRICS, **values: Any) -> Event:
    """Append one line to a file of a run directory; return the event, which has its wall time.

    The file of passing events starts afresh with each round.
    """
    line = {"event": event, "time": round(time.time(), 3), **values}
    mode = "w" if file == PASSING and event == "round_started" else "a"
    with (directory / file).open(mode, encoding="utf-8", errors="backslashreplace") as opened:
        opened.write(json.dumps(line, ensure_ascii=False) + "\n")
    return line


def is_ours(directory: Path) -> bool:
    """Say whether a run of fedfora made a checkpoint's, a round's or a site's directory.

    Only such a directory is ever removed. One without any file holds nothing of anybody's.
    """
    marked = any(any(directory.glob(mark)) for marks in _MARKS.values() for mark in marks)
    return marked or not any(directory.iterdir())


def check_output_dir(output_dir: str | Path, *, overwrite: bool, to_resume: str = "") -> None:
    """Raise if a run could not be written there, or would destroy what fedfora did not write.

    Args:
        output_dir: Of the run.
        overwrite: Whether it may take the place of another.
        to_resume: What to type to resume a run that is there; empty where nothing can.

    Raises:
        ValueError: If the directory is no directory or nothing can be written there; if it holds a
            model, or checkpoints of another program; if it holds another run or files that the run
            would write over, and `overwrite` is false.
    """
    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output_dir {output_dir} is not a directory")
    if (directory / "config.json").exists():
        raise ValueError(
            f"--output_dir {output_dir} holds a model (config.json), which an adapter beside it "
            "would change; name another directory"
        )
    inner = (path for pattern in _MARKS for path in sorted(directory.glob(pattern)))
    if foreign := [path for path in inner if not (path.is_dir() and is_ours(path))]:
        raise ValueError(
            f"--output_dir {output_dir} holds {foreign[0].relative_to(directory)}, which fedfora "
            "did not write and would remove; move it, or name another directory"
        )
    if not overwrite:
        if any((directory / name).exists() for name in ("config.yaml", "metrics.jsonl")):
            raise ValueError(
                f"--output_dir {output_dir} holds another run: --overwrite_output_dir starts over"
                + (f", {to_resume} resumes it" if to_resume else "")
            )
        if found := sorted(path.name for name in _FILES for path in directory.glob(name)):
            raise ValueError(
                f"--output_dir {output_dir} holds {', '.join(found[:3])}: name another directory, "
                "or --overwrite_output_dir to write over what is there"
            )
    parent = _nearest_existing(directory)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written: {error}") from error


def check_disk_space(
    output_dir: str | Path, needed_bytes: int, *, flag: str = "--output_dir "
) -> None:
    """Raise if a run does not fit on the disk, naming what is needed and what there is."""
    free = shutil.disk_usage(_nearest_existing(Path(output_dir))).free
    if free < needed_bytes:
        raise ValueError(
            f"{flag}{output_dir}: the run writes about {needed_bytes / 2**20:,.0f} MiB, the "
            f"disk has {free / 2**20:,.0f} MiB left"
        )


def environment() -> dict[str, Any]:
    """Return versions and hardware."""
    torch = sys.modules.get("torch")  # a report alone need not load it
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "packages": {name: found for name in PACKAGES if (found := installed_version(name))},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch
        else [],
    }


def _nearest_existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def command() -> str | None:
    """Return the fedfora command of this process as one would type it; None in other programs."""
    program = Path(sys.argv[0])
    if program.name == "fedfora" or program.parts[-2:] == ("fedfora", "__main__.py"):
        return shlex.join(["fedfora", *sys.argv[1:]])
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all.

    Half a character, as in a file's name that is not UTF-8, is written as JSON and YAML escape it.
    """
    write_atomically(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Write a JSON file so that it appears whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys)
    write_text(path, text + "\n")


def peak_memory_bytes() -> int:
    """Return the most memory since the last `reset_peak_memory`, or since the process began.

    On the GPU where the process uses one, otherwise resident.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    if (status := Path("/proc/self/status")).exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Reset the peak, where the system can; elsewhere it stays that of the whole process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        # Linux: this resets the high-water mark of resident memory.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
