"""Who has sent in the round that is on: told by the run, read by whoever watches from outside.

metrics.jsonl gets a round's line when the round is over. Until then `round.jsonl` in the run
directory holds a first line with the round and its sites, and a line for each site that has sent.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FILE = "round.jsonl"


@dataclass(frozen=True)
class CurrentRound:
    """A round that is on.

    Args:
        number: Which.
        drawn: The sites that take part.
        sent: Those of them that have sent a usable update.
    """

    number: int
    drawn: list[str]
    sent: list[str]


def begin_round(directory: Path, number: int, drawn: list[str]) -> None:
    """Say that a round begins with these sites."""
    _write(directory, "w", {"round": number, "sites": drawn})


def note_sent(directory: Path, site: str) -> None:
    """Say that a site has sent."""
    _write(directory, "a", {"site": site})


def no_round(directory: Path) -> None:
    """Say that no round is on any more."""
    (directory / FILE).unlink(missing_ok=True)


def read_round(directory: Path) -> CurrentRound | None:
    """Return the round that is on, or was on last; None where there is none to see."""
    try:
        text = (directory / FILE).read_text(encoding="utf-8")
    except OSError:
        return None
    first, *others = [json.loads(line) for line in text.split("\n")[:-1]] or [None]
    if first is None:
        return None
    return CurrentRound(first["round"], first["sites"], [line["site"] for line in others])


def _write(directory: Path, mode: str, line: dict[str, object]) -> None:
    with (directory / FILE).open(mode, encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
