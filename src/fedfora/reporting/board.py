"""Where a run stands: its sites, its numbers, its bytes; and how that looks on a terminal.

The same board is shown inside a running command, which tells it every step, and by `fedfora watch`,
which knows only what the record says.
"""

from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedfora.reporting.current_round import CurrentRound
from fedfora.reporting.history import Event
from fedfora.reporting.series import sites_of
from fedfora.reporting.wording import data_size, first_numbers, number_words

SITES_SHOWN = 12
_STYLES = {"waits": "dim", "sent": "green", "in": "green", "left out": "red", "absent": "red"}


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

    sites: dict[str, SiteRow] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    sent_bytes: int = 0
    round_number: int = 0
    drawn_round: int = 0

    def site(self, name: str) -> SiteRow:
        """Return a site's entry, new if it is not known yet."""
        return self.sites.setdefault(name, SiteRow())

    def draw(self, names: list[str]) -> None:
        """Begin a round with these sites."""
        for site in self.sites.values():
            site.state, site.note = "rests", ""
        for name in names:
            self.site(name).state = "waits"

    def look_at(self, current: CurrentRound) -> None:
        """Take in how far a round has come that has no line in the record yet."""
        if current.number <= self.round_number:
            return  # it is over
        if current.number != self.drawn_round:
            self.drawn_round = current.number
            self.draw(current.drawn)
        for name in current.sent:
            if self.site(name).state == "waits":
                self.site(name).state = "sent"

    def take(self, event: Event) -> None:
        """Take in a line of the record."""
        kind = event.get("event")
        if kind in ("rejected", "absent") and "site" in event:
            site = self.site(str(event["site"]))
            site.state = "absent" if kind == "absent" else "left out"
            site.note = str(event.get("reason", ""))
        elif kind in ("round", "step"):
            again = event.get("round", self.round_number + 1) <= self.round_number
            self.round_number = event.get("round", self.round_number)
            self.numbers |= first_numbers(event)
            for line in sites_of(event):
                site = self.site(str(line["site"]))
                site.state, site.note = "in", ""
                site.loss = line.get("loss", site.loss)
                # A round that was repeated after a stop is counted once, as the report does.
                sent = 0 if again else line.get("uplink_bytes", 0)
                site.sent_bytes += sent
                self.sent_bytes += sent

    def summary(self) -> list[str]:
        """Return the numbers in the order in which one asks for them."""
        said = number_words(self.numbers)
        return said + ([f"sent {data_size(self.sent_bytes)}"] if self.sent_bytes else [])


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
                name,
                Text(site.state, style=_STYLES.get(site.state, "bold")),
                "-" if site.loss is None else f"{site.loss:.3f}",
                data_size(site.sent_bytes) if site.sent_bytes else "",
                Text(site.note, style="red", overflow="ellipsis", no_wrap=True),
            )
        if len(sites) > SITES_SHOWN:
            table.add_row(f"and {len(sites) - SITES_SHOWN} more", "", "", "", "")
        parts.append(table)
    if board.summary():
        said = "   ".join(board.summary())
        parts.append(Text(said, style="cyan", no_wrap=False, overflow="fold"))
    return Group(*parts)


def _rank(site: SiteRow) -> int:
    """Order of few among many: who works, who is left out, who waits, and the rest as they came."""
    if site.state.startswith("step"):
        return 0
    order = ("left out", "absent", "waits")
    return 1 + order.index(site.state) if site.state in order else 5
