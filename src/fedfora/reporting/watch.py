"""A run's record to a board that follows it, in another process than the run's."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from fedfora.registry import counted
from fedfora.reporting.history import Follower, Run, read_run
from fedfora.reporting.record import PASSING, Event
from fedfora.reporting.view import Board, Screen, clock, progress_bar, render
from fedfora.reporting.wording import describe, duration

QUIET_S = 60.0  # after so long without a line, a person wants to know
STOPPED = 5  # times as long without a line as ever before: the run has been stopped, or hangs
LOOK_S = 0.5  # how often a daemon's board is brought up to date


def watch(
    directory: Path, console: Console, *, interval_s: float = 1.0, once: bool = False
) -> None:
    """Show a run until it is finished.

    Without a terminal there are lines instead of a board; `once` shows where it stands and returns.

    Raises:
        ValueError: If there is no run.
    """
    standing = RunStatus(read_run(directory))
    if once:
        standing.update()
        console.print(standing.renderable())
        return
    drawn = console.is_terminal
    with Live(get_renderable=standing.renderable, console=console) if drawn else nullcontext():
        while True:
            for line in standing.update():
                if not drawn:
                    console.print(line, highlight=False, markup=False)
            if standing.over:
                return
            time.sleep(interval_s)


class RunStatus:
    """Where a run stands and how long it will take, from its record and the round that is on.

    The run is as it was found; what it says about rounds is read again.
    """

    def __init__(self, run: Run) -> None:
        self.board = Board()
        self._followers = Follower(run.directory), Follower(run.directory, PASSING)
        self.name, self.directory = run.name, run.directory
        self.axis = "round" if run.config.get("federation") else "step"
        self.total: int | None = run.setting("federation", "num_rounds")
        self.position = 0
        self.seconds = 0.0  # of the run's clock, at its last line
        self.heard = time.time() - _age(run.directory)
        self._longest = 0.0  # time between two lines, in seconds
        self.finished = self.over = False
        self._sampled: int | None = run.setting("federation", "clients_per_round")
        self._arms = set(run.setting("federation", "compare") or ()) & {"alone", "central"}
        self._compared: set[str] = set()  # the arms that are done, by name

    def update(self) -> list[str]:
        """Take in what the run has told since; return a line for each new round or logged step."""
        events = [event for follower in self._followers for event in follower.new()]
        events.sort(key=lambda event: event.get("time", 0.0))
        lines = []
        for event in events:
            self._take(event)
            if event["event"] in ("round", "step"):
                left = self._seconds_left()
                parts = [] if left is None or self.over else [f"{clock(left)} left"]
                lines.append("   ".join([str(describe(event, self.total)), *parts]))
        return lines

    def _take(self, event: Event) -> None:
        self.board.take(event)
        kind = event["event"]
        heard = event.get("time") or time.time() - _age(self.directory)
        if kind not in ("started", "resumed"):
            self._longest = max(self._longest, heard - self.heard)
        self.heard = heard
        if kind == self.axis:
            self.position = event.get(self.axis, self.position)
        self.seconds = event.get("seconds", self.seconds)
        self.total = event.get("steps", self.total) if self.axis == "step" else self.total
        self.finished = kind == "finished" or (self.finished and kind != "resumed")
        if kind == "row" and event["kind"] in self._arms:
            self._compared.add(event["name"])
        self.over = self.finished and not self._arms_left()

    def _arms_left(self) -> list[int]:
        """Return the trainings of `--compare` that are to come, each by how many sites' steps."""
        sites = max(1, len(self.board.sites))
        arms = [1] * sites * ("alone" in self._arms) + [sites] * ("central" in self._arms)
        return arms[len(self._compared) :]

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
        bar.update(task, numbers=self.clock())
        return Group(Text(self.name, style="bold"), render(self.board), bar)

    def clock(self) -> str:
        """Return how long the run took, or what time is left and how long it has been silent."""
        if self.over:
            return f"finished after {duration(self.seconds)}"
        left, silent = self._seconds_left(), time.time() - self.heard
        if self.total and self.position:
            longest = self.total if self.position >= self.total else 1  # an arm takes all rounds
            usual = max(self._longest, self.seconds / self.position * longest)
            if silent > max(QUIET_S, STOPPED * usual):
                at = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.heard))
                return f"seems to have stopped at {at}"
        parts = [f"{clock(left - silent)} left"] if left is not None and left > silent else []
        if parts and (arms := len(self._arms_left())):
            parts[0] += f", with {counted(arms, 'arm')} to compare"
        parts += [f"last line {duration(silent)} ago"] if silent > QUIET_S else []
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        """Return how long it was to take from its last line on."""
        if not self.total or not self.position:
            return None
        sampled = self._sampled or max(1, len(self.board.sites))
        arms = self.total * sum(self._arms_left()) / sampled  # in rounds
        pace_s = self.seconds / self.position
        return pace_s * (self.total - self.position + arms)


def _age(directory: Path) -> float:
    path = directory / "metrics.jsonl"
    return time.time() - path.stat().st_mtime if path.is_file() else 0.0


class RunsBoard(Screen):
    """Below the lines of a daemon, the newest run of a directory; other processes write the runs.

    Args:
        runs: Directory with a run directory for each run; it may come later.
        console: Where to. By default the standard output as it is now: what a library prints while
            somebody catches it must not have the board in it.
    """

    def __init__(self, runs: Path, console: Console | None = None) -> None:
        super().__init__(console or Console(file=sys.stdout, soft_wrap=True, markup=False))
        self._runs = runs
        self._began = time.time()
        self._looked = 0.0
        self._standing: RunStatus | None = None

    def render(self) -> RenderableType:
        """Return the board of the newest run, which is looked for now and then."""
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._look()
        return Group() if self._standing is None else self._standing.renderable()

    def _look(self) -> None:
        """Follow the run that was written to last, if that was since this board began.

        What cannot be read now, while it is written, is read later.
        """
        try:
            records = [
                (path.stat().st_mtime, path.parent)
                for path in self._runs.glob("*/metrics.jsonl")
                if (path.parent / "config.yaml").is_file()
            ]
            written, newest = max(records, default=(0.0, None))
            known = None if self._standing is None else self._standing.directory
            if newest not in (None, known) and written >= self._began:
                self._standing = RunStatus(read_run(newest))
            if self._standing is not None:
                self._standing.update()
        except (OSError, ValueError):
            return
