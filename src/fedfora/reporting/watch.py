"""A run's record to a board that follows it, in another process than the run's."""

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from fedfora.reporting.history import read_run
from fedfora.reporting.standing import RunStatus


def watch(
    directory: Path, console: Console, *, interval_s: float = 1.0, once: bool = False
) -> None:
    """Show a run until it is finished.

    Args:
        directory: The run's.
        console: Where to; without a terminal, lines instead of a board.
        interval_s: Seconds between two looks.
        once: Show where it stands and return.

    Raises:
        ValueError: If there is no run.
    """
    standing = RunStatus(read_run(directory))
    if once:
        standing.update()
        console.print(standing.renderable())
    elif console.is_terminal:
        with Live(
            get_renderable=standing.renderable, console=console, refresh_per_second=4
        ) as live:
            while standing.update() is not None and not standing.over:
                time.sleep(interval_s)
            live.refresh()
    else:
        _watch_plainly(standing, console, interval_s=interval_s)


def _watch_plainly(standing: RunStatus, console: Console, *, interval_s: float) -> None:
    while True:
        for line in standing.update():
            console.print(line, highlight=False)
        if standing.over:
            return
        time.sleep(interval_s)
