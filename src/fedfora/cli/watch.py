"""fedfora watch RUN: follow a run from another terminal, or in a browser, by its record.

Ctrl-C ends the view, not the run. Without a terminal, it prints a line for each round or logged
step. With --web, RUN may also be a directory of runs, which a browser shows and compares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfora.config import ConfigError, ConfigParser, Options, flag


@dataclass
class WatchArguments(Options):
    """Run, interval, and where to show it."""

    run: str | None = flag(None, "the run directory; also the first word")
    interval_s: float = flag(1.0, "seconds between reads of the record", within="[0.05, 3600]")
    once: bool = flag(False, "show where the run stands, and exit")
    web: bool = flag(False, "serve a read-only page of the run, or of all runs in a directory")
    host: str = flag("127.0.0.1", "with --web: address to listen on; any but loopback has a token")
    port: int = flag(8765, "with --web: port to listen on; 0 takes a free one", within="[0, 65535]")
    token: bool = flag(False, "with --web: ask for a token even on this machine, if others use it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.web and self.once:
            raise ConfigError("--web serves a page, --once prints where the run stands: choose one")
        if not self.web and (self.token or self.host != "127.0.0.1" or self.port != 8765):
            raise ConfigError("--host, --port and --token need --web")


def run(argv: Sequence[str]) -> None:
    """Parse, and follow the run until it is finished."""
    (arguments,) = ConfigParser([WatchArguments], description=__doc__, first="run").parse(argv)
    if arguments.run is None:
        raise ConfigError("no run given: fedfora watch RUN, e.g. fedfora watch out/demo")
    path, host, port = Path(arguments.run), arguments.host, arguments.port
    if arguments.web:
        from fedfora.reporting.web import serve

        serve(path, host=host, port=port, with_token=arguments.token)
        return
    from rich.console import Console

    from fedfora.reporting.watch import watch

    console = Console(soft_wrap=True, markup=False)
    watch(path, console, interval_s=arguments.interval_s, once=arguments.once)
