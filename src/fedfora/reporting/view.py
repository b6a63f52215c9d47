"""What a person sees while a run works: a board on a terminal, plain lines elsewhere.

The same board is shown inside a running command, which tells it every step, and by `fedfora watch`,
which knows only what the record says.
"""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedfora.registry import counted
from fedfora.reporting.history import sites_of
from fedfora.reporting.record import Event
from fedfora.reporting.wording import data_size, describe, first_numbers, number_words

PLAIN_INTERVAL_S = 10.0
LONG_S = 120  # work that takes longer is announced, with the way to make it shorter
SITES_SHOWN = 12
_STYLES = {"waits": "dim", "sent": "green", "in": "green", "left out": "red", "absent": "red"}
EVALUATED_ROW = 0.12  # answering a row costs about so much of an optimizer step


class Screen(ABC):
    """A context manager: lines that stay and, on a terminal, what is redrawn below them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None

    def __enter__(self) -> Self:
        """Draw four times a second from now on, where there is a terminal."""
        if self.console.is_terminal:
            self.live = Live(get_renderable=self.render, console=self.console, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, markup=False)

    @abstractmethod
    def render(self) -> RenderableType:
        """Return what to draw."""


class View(Screen):
    """Counts the work done, in optimizer steps, and shows progress; `take` is a run's listener."""

    def __init__(self, total_steps: float, console: Console | None = None) -> None:
        super().__init__(console or Console(soft_wrap=True, markup=False))
        self.total = total_steps
        self.done = 0.0
        self.board = Board()
        self._places: int | None = None  # how many rounds or steps there will be
        self._round = ""
        self._stepped: set[str] = set()  # sites whose steps of this round have been counted
        self._warm: tuple[float, float] | None = None  # when the first step was done, and where
        self._announced = False
        self._pace = (time.monotonic(), 0)  # when the tokens were counted last from, and how many
        self._last_line = time.monotonic()
        self._bar = progress_bar()
        self._task = self._bar.add_task("starting", total=total_steps, numbers="")

    def take(self, event: Event) -> None:
        """Show an event of a run: on the board, as work done, as a line that stays."""
        self.board.take(event)
        match event["event"]:
            case "started":
                self.total = self._places = event["steps"]
                self._pace = (time.monotonic(), event["tokens"])
                self.advance(event["step"], "starting")
            case "resumed":
                self._places = event["num_rounds"]
                self.advance(self.total * event["after_round"] / event["num_rounds"], "resumed")
            case "round_started":
                self._places, self._stepped = event["num_rounds"], set()
                self._round = f"round {event['round']}/{event['num_rounds']}"
            case "step":
                what = f"step {event['step']}/{self._places}"
                self.advance(1, what, loss=event.get("loss"), speed=self._speed(event))
            case "site_step":
                self._stepped.add(event["site"])
                first = event["step"] == 1
                self._pace = (time.monotonic(), event["tokens"]) if first else self._pace
                speed = None if first or not event["tokens"] else self._speed(event)
                what = f"{self._round} {event['site']}"
                self.advance(1, what, loss=event.get("loss"), speed=speed)
            case "site_sent" if event["site"] not in self._stepped and "steps" in event:
                what = f"{self._round} {event['site']}"
                self.advance(event["steps"], what, loss=event.get("loss"))
            case "evaluated":
                self.advance(event["rows"] * EVALUATED_ROW, f"{self._round} evaluation")
                if not self._round:  # the base was scored: that says nothing of a step's pace
                    self._warm = None
        if event["event"] != "step" and (text := describe(event, self._places)):
            self.line(text)

    def _speed(self, event: Event) -> float:
        since, tokens = self._pace
        return float((event["tokens"] - tokens) / (time.monotonic() - since))

    def advance(
        self, steps: float, what: str, *, loss: float | None = None, speed: float | None = None
    ) -> None:
        """Count work and show where it stands.

        `steps` are optimizer steps since the last call, `what` is, e.g., "round 3/10 cardiology",
        `speed` tokens per second.
        """
        self.done += steps
        parts = [] if loss is None else [f"loss {loss:.3f}"]
        numbers = "  ".join(parts if speed is None else [*parts, f"{speed:,.0f} tokens/s"])
        self._bar.update(
            self._task, advance=steps, total=self.total, description=what, numbers=numbers
        )
        if self._warm is None:
            self._warm = (time.monotonic(), self.done) if self.done else None
        since, before = self._warm or (0.0, self.done)
        pace = (time.monotonic() - since) / (self.done - before) if self.done > before else None
        left = max(0.0, self.total - self.done)
        if pace is not None and self.done - before >= 2 and not self._announced:
            self._announced = True  # once, from the second and third step
            if pace * left >= LONG_S:
                some = counted(round(left), "step")
                fewer = "--num_rounds, --local_steps" if self._round else "--max_steps"
                self.line(
                    f"about {clock(pace * left)} to go: {some} of {pace:.1f} s (fewer: {fewer})"
                )
        if self.live is None and time.monotonic() - self._last_line > PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            remaining = [] if pace is None else [f"{clock(pace * left)} left"]
            self.line("  ".join([what, *filter(None, [numbers]), *remaining]))

    def render(self) -> RenderableType:
        """Return the board and the bar."""
        return Group(render(self.board), self._bar)


def progress_bar() -> Progress:
    """Return a bar with the current work, its progress and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def clock(seconds: float) -> str:
    """Return seconds as m:ss, or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass
class SiteRow:
    """What is known of a site.

    Args:
        state: "waits", "step 3/5", "sent", "in", "left out", "absent".
        loss: Its latest training loss.
        sent_bytes: What it has sent so far.
        note: Why it is left out.
    """

    state: str = "waits"
    loss: float | None = None
    sent_bytes: int = 0
    note: str = ""


@dataclass
class Board:
    """Where a run stands."""

    sites: dict[str, SiteRow] = field(default_factory=lambda: defaultdict(SiteRow))
    numbers: dict[str, float] = field(default_factory=dict)
    sent_bytes: int = 0
    round_number: int = 0
    drawn_round: int = 0

    def take(self, event: Event) -> None:
        """Take in an event."""
        kind = event.get("event")
        if kind == "round_started":
            self.drawn_round = event["round"]
            for site in self.sites.values():
                site.state, site.note = "rests", ""
            for name in event["sites"]:
                self.sites[name].state = "waits"
        elif kind == "site_step":
            site = self.sites[event["site"]]
            site.state, site.loss = f"step {event['step']}/{event['steps']}", event.get("loss")
        elif kind == "site_sent":
            self.sites[event["site"]].state = "sent"
        elif kind in ("rejected", "absent") and "site" in event:
            site = self.sites[str(event["site"])]
            site.state = "absent" if kind == "absent" else "left out"
            site.note = str(event.get("reason", ""))
        elif kind in ("round", "step"):
            again = event.get("round", self.round_number + 1) <= self.round_number
            self.round_number = event.get("round", self.round_number)
            self.numbers |= first_numbers(event)
            for line in sites_of(event):
                site = self.sites[str(line["site"])]
                site.state, site.note = "in", ""
                site.loss = line.get("loss", site.loss)
                # A round that was repeated after a stop is counted once, as the report does.
                sent = 0 if again else line.get("uplink_bytes", 0)
                site.sent_bytes += sent
                self.sent_bytes += sent

    def summary(self) -> list[str]:
        """Return the numbers in the order in which one asks for them."""
        parts = number_words(self.numbers)
        return parts + ([f"sent {data_size(self.sent_bytes)}"] if self.sent_bytes else [])


def render(board: Board) -> RenderableType:
    """Return the board as rich shows it: a table of sites, and a line of numbers."""
    parts: list[RenderableType] = []
    if board.sites:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
        for column in ("site", "state", "loss", "sent", ""):
            table.add_column(column, justify="right" if column in ("loss", "sent") else "left")
        sites = list(board.sites.items())
        if len(sites) > SITES_SHOWN:
            sites.sort(key=lambda entry: _rank(entry[1]))
        for name, site in sites[:SITES_SHOWN]:
            table.add_row(
                Text(name),
                Text(site.state, style=_STYLES.get(site.state, "bold")),
                "-" if site.loss is None else f"{site.loss:.3f}",
                data_size(site.sent_bytes) if site.sent_bytes else "",
                Text(site.note, style="red", overflow="ellipsis", no_wrap=True),
            )
        if len(sites) > SITES_SHOWN:
            table.add_row(f"and {len(sites) - SITES_SHOWN} more", "", "", "", "")
        parts.append(table)
    if summary := "   ".join(board.summary()):
        parts.append(Text(summary, style="cyan", no_wrap=False, overflow="fold"))
    return Group(*parts)


def _rank(site: SiteRow) -> int:
    """Order of few among many: who works, who is left out, who waits, and the rest as they come."""
    if site.state.startswith("step"):
        return 0
    order = ("left out", "absent", "waits")
    return 1 + order.index(site.state) if site.state in order else 5
