"""fedfora site: what one site of a real federation runs.

`fedfora site journal --kit DIR` shows what has left the site, and whether its journal is whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfora.cli.console import log_line, silence_libraries
from fedfora.config import ConfigParser, flag
from fedfora.deployment.journal import Line, last_digest, read_journal, shown
from fedfora.deployment.kit import read_site_kit


@dataclass
class SiteArguments:
    """Which site."""

    kit: str = flag(".", "directory of the site's kit, as `fedfora provision` made it")


def run(argv: Sequence[str]) -> None:
    """Run the site's processes until told to stop, or show its journal."""
    if argv[:1] == ["journal"]:
        parser = ConfigParser([SiteArguments], prog="fedfora site journal", description=__doc__)
        (arguments,) = parser.parse(argv[1:])
        show_journal(read_site_kit(arguments.kit).state)
        return
    parser = ConfigParser([SiteArguments], prog="fedfora site", description=__doc__)
    (arguments,) = parser.parse(argv)
    silence_libraries()
    kit = read_site_kit(arguments.kit)
    log_line(
        f"site {kit.name} of {kit.federation}, for {kit.host}:{kit.port}; logs: {kit.state}/logs"
    )
    from fedfora.deployment.site import run_site

    run_site(kit, log_line)
    log_line("stopped")


def show_journal(state: Path) -> list[Line]:
    """Print a kit's journal, checked, and return it."""
    lines = read_journal(state)
    for line in lines:
        print(shown(line))
    print(f"{len(lines)} lines, each follows the one before; last digest {last_digest(state)}")
    return lines
