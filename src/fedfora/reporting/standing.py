"""Where a run stands, from its record and the round that is on: for who watches from outside."""

import time
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from fedfora.reporting.board import Board, render
from fedfora.reporting.current_round import read_round
from fedfora.reporting.follow import Follower
from fedfora.reporting.history import Event, Run
from fedfora.reporting.view import clock, progress_bar
from fedfora.reporting.wording import duration

QUIET_S = 60.0  # after so long without a line, a person wants to know


class RunStatus:
    """Where a run stands, and how long it will take.

    Args:
        run: As it was found; what it says of rounds is read anew.
    """

    def __init__(self, run: Run) -> None:
        self.board = Board()
        self._follower = Follower(run.directory)
        self.name, self.directory = run.name, run.directory
        self.axis = "round" if run.config.get("federation") else "step"
        self.total: int | None = run.setting("federation", "num_rounds")
        self.position = 0
        self.seconds = 0.0  # of the run's clock, at its last line
        self.heard = time.time() - _age(run.directory)
        self.over = False

    def update(self) -> list[str]:
        """Take in what the run has told since.

        Returns:
            A line of text for each new round or logged step.
        """
        events, lines = self._follower.new(), []
        for event in events:
            self._take(event)
            if event.get("event") in ("round", "step"):
                lines.append(self._line())
        if events:
            self.heard = time.time() - _age(self.directory)
        if (current := read_round(self.directory)) is not None:
            self.board.look_at(current)
        return lines

    def _take(self, event: Event) -> None:
        self.board.take(event)
        self.position = event.get(self.axis, self.position)
        self.seconds = event.get("seconds", self.seconds)
        self.total = event.get("steps", self.total) if self.axis == "step" else self.total
        self.over = event.get("event") == "finished" or (
            self.over and event.get("event") != "resumed"
        )

    def renderable(self) -> RenderableType:
        """Return the board with the run's name, bar and age of the last line."""
        bar = progress_bar()
        task = bar.add_task(
            f"{self.axis} {max(self.position, self.board.drawn_round)}",
            total=self.total,
            completed=self.position,
            numbers="",
        )
        bar.columns = bar.columns[:3]  # its clock knows only this process
        bar.update(task, numbers=self._clock())
        return Group(Text(self.name, style="bold"), render(self.board), bar)

    def _line(self) -> str:
        left = self._seconds_left()
        return "   ".join(
            [
                f"{self.axis} {self.position}/{self.total or '?'}",
                *self.board.summary(),
                *([] if left is None or self.over else [f"{clock(left)} left"]),
            ]
        )

    def _clock(self) -> str:
        if self.over:
            return f"finished after {duration(self.seconds)}"
        left, silent = self._seconds_left(), time.time() - self.heard
        parts = [] if left is None else [f"{clock(left)} left"]
        parts += [f"last line {duration(silent)} ago"] if silent > QUIET_S else []
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        if not self.total or not self.position:
            return None
        since = time.time() - self.heard
        return max(0.0, self.seconds / self.position * (self.total - self.position) - since)


def _age(directory: Path) -> float:
    path = directory / "metrics.jsonl"
    return time.time() - path.stat().st_mtime if path.is_file() else 0.0
