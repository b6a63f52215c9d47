"""A run's record to a board that follows it, in another process than the run's."""

import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from fedfora.reporting.board import Board, render
from fedfora.reporting.follow import Follower
from fedfora.reporting.history import Event, Run, read_run
from fedfora.reporting.view import clock, progress_bar
from fedfora.reporting.wording import duration

QUIET_S = 60.0  # after so long without a line, a person wants to know


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
    run = read_run(directory)
    follower, standing = Follower(directory), _Standing(run)
    if once or not console.is_terminal:
        _watch_plainly(follower, standing, console, interval_s=interval_s, once=once)
        return
    with Live(
        get_renderable=lambda: standing.renderable(), console=console, refresh_per_second=4
    ) as live:
        while not standing.take(follower.new()):
            time.sleep(interval_s)
        live.refresh()


def _watch_plainly(
    follower: Follower, standing: "_Standing", console: Console, *, interval_s: float, once: bool
) -> None:
    while True:
        over = False
        for event in follower.new():
            over = standing.take([event])
            if event.get("event") in ("round", "step") and not once:
                console.print(standing.line(), highlight=False)
        if once:
            console.print(standing.renderable())
        if over or once:
            return
        time.sleep(interval_s)


class _Standing:
    """Where a run stands, and how long it will take."""

    def __init__(self, run: Run) -> None:
        self.board = Board()
        self.name, self.directory = run.name, run.directory
        self.axis = "round" if run.config.get("federation") else "step"
        self.total: int | None = run.setting("federation", "num_rounds")
        self.place = 0
        self.seconds = 0.0  # of the run's clock, at its last line
        self.heard = time.time() - _age(run.directory)
        self.over = False

    def take(self, events: list[Event]) -> bool:
        """Take in some events; return whether the run is over."""
        for event in events:
            self.board.take(event)
            self.place = event.get(self.axis, self.place)
            self.seconds = event.get("seconds", self.seconds)
            self.total = event.get("steps", self.total) if self.axis == "step" else self.total
            self.over = event.get("event") == "finished" or (
                self.over and event.get("event") != "resumed"
            )
        if events:
            self.heard = time.time() - _age(self.directory)
        return self.over

    def line(self) -> str:
        """Return where the run stands, in a line."""
        left = self._seconds_left()
        return "   ".join(
            [
                f"{self.axis} {self.place}/{self.total or '?'}",
                *self.board.said(),
                *([] if left is None or self.over else [f"{clock(left)} left"]),
            ]
        )

    def renderable(self) -> RenderableType:
        """Return the board with the run's name, bar and age of the last line."""
        bar = progress_bar()
        task = bar.add_task(
            f"{self.axis} {self.place}", total=self.total, completed=self.place, numbers=""
        )
        bar.columns = bar.columns[:3]  # its clock knows only this process
        bar.update(task, numbers=self._clock())
        return Group(Text(self.name, style="bold"), render(self.board), bar)

    def _clock(self) -> str:
        if self.over:
            return f"finished after {duration(self.seconds)}"
        left, silent = self._seconds_left(), time.time() - self.heard
        parts = [] if left is None else [f"{clock(left)} left"]
        parts += [f"last line {duration(silent)} ago"] if silent > QUIET_S else []
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        if not self.total or not self.place:
            return None
        since = time.time() - self.heard
        return max(0.0, self.seconds / self.place * (self.total - self.place) - since)


def _age(directory: Path) -> float:
    path = directory / "metrics.jsonl"
    return time.time() - path.stat().st_mtime if path.is_file() else 0.0
