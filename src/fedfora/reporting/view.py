"""What a person sees while a run works: a board on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedfora.reporting.board import Board, render
from fedfora.reporting.live import start_live

PLAIN_INTERVAL_S = 10.0
EVALUATED_ROW = 0.05  # answering a row costs about so much of an optimizer step


class View:
    """Counts the work done, in optimizer steps, and shows what goes on.

    Use it as a context manager; `line` prints above the board. Whoever knows of sites or numbers
    tells the `board`.
    """

    def __init__(self, total_steps: float, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.total = total_steps
        self.done = 0.0
        self.board = Board()
        self._started = self._last_line = time.monotonic()
        self._live: Live | None = None
        self._bar = progress_bar()
        self._task = self._bar.add_task("starting", total=total_steps, numbers="")

    def __enter__(self) -> "View":
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
        self.console.print(text, highlight=False)

    def advance(
        self, steps: float, what: str, *, loss: float | None = None, speed: float | None = None
    ) -> None:
        """Count work and show where it stands.

        Args:
            steps: Work done since the last call, in optimizer steps.
            what: What is being done, e.g. "round 3/10 cardiology".
            loss: The latest training loss.
            speed: Tokens per second.
        """
        self.done += steps
        shown = [] if loss is None else [f"loss {loss:.3f}"]
        numbers = "  ".join(shown if speed is None else [*shown, f"{speed:,.0f} tokens/s"])
        self._bar.update(
            self._task, advance=steps, total=self.total, description=what, numbers=numbers
        )
        if self._live is None and time.monotonic() - self._last_line > PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            left = [f"{clock(self._seconds_left())} left"] if self.done else []
            self.line("  ".join([what, *filter(None, [numbers]), *left]))

    def _render(self) -> RenderableType:
        return Group(render(self.board), self._bar)

    def _seconds_left(self) -> float:
        elapsed = time.monotonic() - self._started
        return elapsed * max(0.0, self.total / self.done - 1)


def progress_bar() -> Progress:
    """Return a bar with what goes on, how far it is, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def clock(seconds: float) -> str:
    """Return seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
