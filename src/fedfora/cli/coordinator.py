"""fedfora coordinator: run the coordinator of a real federation.

`fedfora coordinator --kit DIR` keeps SuperLink and gate running; with the word `run` before the
flags, it does so for one run, resuming one that was interrupted.
`fedfora coordinator journal --kit DIR` shows which sites were admitted or removed, what came from
which site, who started what, and whether the journal is intact; it can be compared with a site's.

On a terminal, a board below the log lines shows the current run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedfora.cli.console import runs_part, silence_libraries, timestamped
from fedfora.cli.site import show_journal
from fedfora.config import ConfigParser, flag
from fedfora.deployment.journal import disagreements, read_journal
from fedfora.deployment.kit import CoordinatorKit, read_kit
from fedfora.deployment.run_state import RUNS
from fedfora.deployment.settings import KitArguments
from fedfora.deployment.supervisor import stoppable
from fedfora.reporting.watch import RunsBoard


@dataclass
class RunChoice:
    """Which run."""

    new: bool = flag(False, "start a new run even if the last one has not finished")


@dataclass
class JournalChoice:
    """Whose journal is compared with the coordinator's."""

    site_journal: str | None = flag(
        None, "directory with a site's journal.jsonl and journal.head, to compare with"
    )


def run(argv: Sequence[str]) -> None:
    """Run the coordinator's processes, forever or for one run, or show its journal."""
    if runs_part(argv, {"run": _run, "journal": _journal}):
        return
    (arguments,) = ConfigParser([KitArguments], description=__doc__).parse(argv)
    silence_libraries()
    kit = read_kit(arguments.kit, CoordinatorKit)
    with _told(kit) as say:
        from fedfora.deployment.coordinator import run_coordinator

        run_coordinator(kit, say)
        say("stopped")


def _run(argv: Sequence[str]) -> None:
    arguments, choice = ConfigParser(
        [KitArguments, RunChoice], prog="fedfora coordinator run", description=__doc__
    ).parse(argv)
    silence_libraries()
    kit = read_kit(arguments.kit, CoordinatorKit)
    with stoppable():
        with _told(kit) as say:
            from fedfora.deployment.run import run_to_the_end

            directory = run_to_the_end(kit, say, new=choice.new)
        print(f"adapter, metrics, report.html: {directory}")


def _journal(argv: Sequence[str]) -> None:
    """Show the journal, and compare it with a site's."""
    arguments, choice = ConfigParser(
        [KitArguments, JournalChoice], prog="fedfora coordinator journal", description=__doc__
    ).parse(argv)
    lines = show_journal(read_kit(arguments.kit, CoordinatorKit).state)
    if choice.site_journal is not None:
        if found := disagreements(lines, read_journal(Path(choice.site_journal))):
            raise ValueError(f"--site_journal {choice.site_journal}: {'; '.join(found[:5])}")
        print(f"every answer from that site is the one that {choice.site_journal} says was sent")


@contextmanager
def _told(kit: CoordinatorKit) -> Iterator[Callable[[str], None]]:
    """Give a function that prints a line above the current run's board; print the first line."""
    with RunsBoard(kit.state / RUNS) as board:

        def say(text: str) -> None:
            board.line(timestamped(text))

        say(f"coordinator of {kit.federation}, at {kit.host}:{kit.port}; logs: {kit.state}/logs")
        yield say
