"""fedfora watch RUN: follow a run from another terminal, by its record.

Ctrl-C leaves; the run goes on. Without a terminal, one line for each round or logged step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfora.config import ConfigError, ConfigParser, flag


@dataclass
class WatchArguments:
    """How often to look."""

    interval_s: float = flag(1.0, "seconds between two looks at the record")
    once: bool = flag(False, "show where the run stands, and leave")

    def __post_init__(self) -> None:
        """Refuse what would never look."""
        if not 0.05 <= self.interval_s <= 3600:
            raise ValueError(f"--interval_s must be in [0.05, 3600], got {self.interval_s}")


def run(argv: Sequence[str]) -> None:
    """Parse, and follow the run until it is finished."""
    words = list(argv)
    run_dir = None
    for place in (0, -1):  # `watch DIR --once` and `watch --once DIR`
        before = words[-2:-1] if place else []
        if words and not words[place].startswith("-") and before != ["--interval_s"]:
            run_dir = words.pop(place)
            break
    parser = ConfigParser(
        [WatchArguments],
        prog="fedfora watch",
        usage="fedfora watch RUN [--interval_s SECONDS] [--once]",
        description=__doc__,
    )
    (arguments,) = parser.parse(words)
    if run_dir is None:
        raise ConfigError("which run? fedfora watch RUN, e.g. fedfora watch out/demo")
    from rich.console import Console

    from fedfora.reporting.watch import watch

    watch(
        Path(run_dir),
        Console(soft_wrap=True),
        interval_s=arguments.interval_s,
        once=arguments.once,
    )
