"""fedfora rehearse SITES.yaml: the whole deployment on this machine, and a verdict per site."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfora.cli.console import log_line, silence_libraries
from fedfora.config import ConfigParser, Options, flag
from fedfora.deployment.sites_file import read_sites_file
from fedfora.deployment.supervisor import stoppable


@dataclass
class RehearsalArguments(Options):
    """Sites file, rounds and time limit."""

    sites_file: str | None = flag(None, "the federation and its sites; or the first word")
    rehearsal_rounds: int = flag(2, "rounds at most", least=1)
    deadline: float = flag(900.0, "seconds after which the rehearsal is stopped", above=0)
    keep: str | None = flag(None, "a new directory in which kits, logs and run are kept")


def run(argv: Sequence[str]) -> None:
    """Rehearse, print the verdicts, and fail if one is bad.

    Raises:
        ValueError: If a site failed.
    """
    (arguments,) = ConfigParser(
        [RehearsalArguments],
        prog="fedfora rehearse SITES.yaml",
        description=__doc__,
        first="sites_file",
    ).parse(argv)
    if arguments.sites_file is None:
        raise ValueError("which federation? fedfora rehearse SITES.yaml")
    silence_libraries()
    plan = read_sites_file(arguments.sites_file)
    log_line(f"rehearsal of {plan.federation} with {len(plan.sites)} sites, all on this machine")
    from fedfora.deployment.rehearse import rehearse

    kept = arguments.keep is not None
    directory = Path(arguments.keep or tempfile.mkdtemp(prefix="fedfora-rehearsal-"))
    result = None
    try:
        with stoppable():
            result = rehearse(
                plan,
                directory,
                log_line,
                num_rounds=arguments.rehearsal_rounds,
                deadline_s=arguments.deadline,
            )
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)
    if result is None:
        raise ValueError("stopped before its end")
    for verdict in result.verdicts:
        print(verdict.line())
    if not result.passed:
        raise ValueError("the rehearsal failed" + ("" if kept else "; --keep DIR keeps its logs"))
    print("the rehearsal passed")
