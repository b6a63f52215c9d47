"""The board of whatever run is on among those in a directory, below the lines that a daemon says.

The runs' records are written by other processes; without a terminal there are only the lines.
"""

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live

from fedfora.reporting.history import read_run
from fedfora.reporting.live import start_live
from fedfora.reporting.standing import RunStatus

LOOK_S = 0.5


class RunsBoard:
    """Follows the newest run; use it as a context manager.

    Args:
        runs: Directory with a run directory for each run; it may come later.
        console: Where to. By default the standard output as it is now: what a library prints while
            somebody catches it must not have the board in it.
    """

    def __init__(self, runs: Path, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, soft_wrap=True)
        self._runs = runs
        self._began = time.time()
        self._looked = 0.0
        self._standing: RunStatus | None = None
        self._live: Live | None = None

    def __enter__(self) -> "RunsBoard":
        """Show the board, where there is a terminal."""
        self._live = start_live(self.console, self._render)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the board away."""
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, markup=False)

    def _render(self) -> RenderableType:
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._look()
        return Group() if self._standing is None else self._standing.renderable()

    def _look(self) -> None:
        """Follow the newest run; what cannot be read now, while it is written, is read later."""
        try:
            newest = self._newest()
            if newest is not None and (
                self._standing is None or self._standing.directory != newest
            ):
                self._standing = RunStatus(read_run(newest))
            if self._standing is not None:
                self._standing.update()
        except (OSError, ValueError):
            return

    def _newest(self) -> Path | None:
        """Return the run that was written to last, if that was since this board began."""
        records = [
            (path.stat().st_mtime, path.parent)
            for path in self._runs.glob("*/metrics.jsonl")
            if (path.parent / "config.yaml").is_file()
        ]
        written, directory = max(records, default=(0.0, None))
        return directory if written >= self._began else None
