"""fedfora watch RUN: follow a run from another terminal, by its record.

Ctrl-C leaves the view and not the run. Without a terminal, one line for each round or logged step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfora.config import ConfigError, ConfigParser, Options, flag


@dataclass
class WatchArguments(Options):
    """Which run, and how often to look."""

    run: str | None = flag(None, "the run directory; or the first word")
    interval_s: float = flag(1.0, "seconds between two looks at the record", within="[0.05, 3600]")
    once: bool = flag(False, "show where the run stands, and leave")


def run(argv: Sequence[str]) -> None:
    """Parse, and follow the run until it is finished."""
    parser = ConfigParser(
        [WatchArguments], prog="fedfora watch RUN", description=__doc__, first="run"
    )
    (arguments,) = parser.parse(argv)
    if arguments.run is None:
        raise ConfigError("which run? fedfora watch RUN, e.g. fedfora watch out/demo")
    from rich.console import Console

    from fedfora.reporting.watch import watch

    watch(
        Path(arguments.run),
        Console(soft_wrap=True),
        interval_s=arguments.interval_s,
        once=arguments.once,
    )
