"""fedfora rehearse SITES.yaml: the whole deployment on this machine, and a verdict per site."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedfora.cli.console import log_line, print_results, silence_libraries
from fedfora.config import ConfigParser, Options, flag
from fedfora.deployment.sites_file import read_sites_file
from fedfora.deployment.supervisor import stoppable
from fedfora.registry import counted


@dataclass
class RehearsalArguments(Options):
    """Sites file, rounds and time limit."""

    sites_file: str | None = flag(None, "sites.yaml of the federation; also the first word")
    rehearsal_rounds: int = flag(2, "maximum number of rounds", least=1)
    deadline: float = flag(900.0, "seconds after which the rehearsal is stopped", above=0)
    keep: str | None = flag(None, "keep kits, logs and run in this new directory")


def run(argv: Sequence[str]) -> None:
    """Rehearse, print the verdicts, and fail if a site failed.

    Raises:
        ValueError: If a site failed.
    """
    parser = ConfigParser([RehearsalArguments], description=__doc__, first="sites_file")
    (arguments,) = parser.parse(argv)
    if arguments.sites_file is None:
        raise ValueError("no sites file given: fedfora rehearse SITES.yaml")
    silence_libraries()
    plan = read_sites_file(arguments.sites_file)
    log_line(f"rehearsal of {plan.federation} on this machine: {counted(len(plan.sites), 'site')}")
    from fedfora.deployment.rehearse import rehearse

    with ExitStack() as held, stoppable():
        place = arguments.keep
        if place is None:
            place = held.enter_context(TemporaryDirectory(prefix="fedfora-rehearsal-"))
        log_line(f"logs: {place}/logs" + ("" if arguments.keep else " (--keep DIR keeps them)"))
        rounds, deadline_s = arguments.rehearsal_rounds, arguments.deadline
        results = rehearse(plan, Path(place), log_line, num_rounds=rounds, deadline_s=deadline_s)
        print_results(results)
        print("the rehearsal passed")
        return
    raise ValueError("the rehearsal was stopped before its end")
