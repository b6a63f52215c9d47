"""fedfora coordinator: what the coordinator of a real federation runs.

`fedfora coordinator --kit DIR` keeps SuperLink and gate running; with the word `run` before the
flags, it does so for as long as one run takes, and goes on with the run that was on.

On a terminal, a board below the lines shows the run that is on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fedfora.cli.console import silence_libraries, timestamped
from fedfora.config import ConfigParser, flag
from fedfora.deployment.kit import CoordinatorKit, read_coordinator_kit
from fedfora.deployment.run_state import RUNS
from fedfora.deployment.supervisor import stoppable
from fedfora.reporting.watch import RunsBoard


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
    silence_libraries()
    kit = read_coordinator_kit(arguments.kit)
    with _told(kit) as say:
        from fedfora.deployment.coordinator import run_coordinator

        run_coordinator(kit, say)
        say("stopped")


def _run(argv: Sequence[str]) -> None:
    parser = ConfigParser(
        [CoordinatorArguments, RunChoice], prog="fedfora coordinator run", description=__doc__
    )
    arguments, choice = parser.parse(argv)
    silence_libraries()
    kit = read_coordinator_kit(arguments.kit)
    with stoppable():
        with _told(kit) as say:
            from fedfora.deployment.run import run_to_the_end

            directory = run_to_the_end(kit, say, new=choice.new)
        print(f"adapter, metrics, report.html: {directory}")


@contextmanager
def _told(kit: CoordinatorKit) -> Iterator[Callable[[str], None]]:
    """Return how to say a line, above the board of the run that is on; say the first one."""
    with RunsBoard(kit.state / RUNS) as board:

        def say(text: str) -> None:
            board.line(timestamped(text))

        say(f"coordinator of {kit.federation}, at {kit.host}:{kit.port}; logs: {kit.state}/logs")
        yield say
