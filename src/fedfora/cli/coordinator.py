"""fedfora coordinator: what the coordinator of a real federation runs.

`fedfora coordinator --kit DIR` keeps SuperLink and gate running; with the word `run` before the
flags, it does so for as long as one run takes, and goes on with the run that was on.

On a terminal, a board below the lines shows the run that is on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedfora.config import ConfigParser, flag


@dataclass
class CoordinatorArguments:
    """Which federation."""

    kit: str = flag(".", "directory of the coordinator's kit, as `fedfora provision` made it")


@dataclass
class RunChoice:
    """Which run."""

    new: bool = flag(False, "begin a new run, although the last one has not come to its end")


def run(argv: Sequence[str]) -> None:
    """Run the coordinator's processes: for ever, or for one run."""
    if argv[:1] == ["run"]:
        _run(argv[1:])
        return
    parser = ConfigParser([CoordinatorArguments], prog="fedfora coordinator", description=__doc__)
    (arguments,) = parser.parse(argv)
    from fedfora.deployment.coordinator import run_coordinator
    from fedfora.deployment.kit import read_coordinator_kit

    kit = read_coordinator_kit(arguments.kit)
    with _told(kit.state) as say:
        run_coordinator(kit, say)
        say("stopped")


def _run(argv: Sequence[str]) -> None:
    parser = ConfigParser(
        [CoordinatorArguments, RunChoice], prog="fedfora coordinator run", description=__doc__
    )
    arguments, choice = parser.parse(argv)
    from fedfora.deployment.kit import read_coordinator_kit
    from fedfora.deployment.run import run_to_the_end
    from fedfora.deployment.supervisor import stoppable

    kit = read_coordinator_kit(arguments.kit)
    with stoppable():
        with _told(kit.state) as say:
            directory = run_to_the_end(kit, say, new=choice.new)
        print(f"adapter, metrics, report.html: {directory}")


@contextmanager
def _told(state: Path) -> Iterator[Callable[[str], None]]:
    """Return how to say a line, above the board of the run that is on."""
    from fedfora.cli.saying import stamped
    from fedfora.deployment.run_state import RUNS
    from fedfora.reporting.runs_board import RunsBoard

    with RunsBoard(state / RUNS) as board:
        yield lambda text: board.line(stamped(text))
