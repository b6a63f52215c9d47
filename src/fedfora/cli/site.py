"""fedfora site: run one site of a real federation.

`fedfora site request --kit DIR --name NAME` makes a new site's keys in DIR, and a request to hand
to the coordinator; in an existing kit, it makes keys to replace the kit's own.
`fedfora site journal --kit DIR` shows what has left the site, and whether its journal is intact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fedfora.cli.console import log_line, runs_part, silence_libraries
from fedfora.config import ConfigParser, flag
from fedfora.deployment.journal import Line, last_digest, read_journal, shown
from fedfora.deployment.kit import SiteKit, read_kit
from fedfora.deployment.settings import KitArguments


@dataclass
class RequestArguments:
    """A site that makes its keys itself."""

    kit: str = flag(".", "directory for a new kit, or of a kit whose keys are to be replaced")
    name: str | None = flag(None, "name of the site, as the coordinator's sites.yaml has it")


def run(argv: Sequence[str]) -> None:
    """Run the site's processes until told to stop, or show its journal."""
    if runs_part(argv, {"journal": _journal, "request": _request}):
        return
    (arguments,) = ConfigParser([KitArguments], description=__doc__).parse(argv)
    silence_libraries()
    kit = read_kit(arguments.kit, SiteKit)
    log_line(
        f"site {kit.name} of {kit.federation}, for {kit.host}:{kit.port}; logs: {kit.state}/logs"
    )
    from fedfora.deployment.site import run_site

    run_site(kit, log_line)
    log_line("stopped")


def _journal(argv: Sequence[str]) -> None:
    parser = ConfigParser([KitArguments], prog="fedfora site journal", description=__doc__)
    (arguments,) = parser.parse(argv)
    show_journal(read_kit(arguments.kit, SiteKit).state)


def _request(argv: Sequence[str]) -> None:
    parser = ConfigParser([RequestArguments], prog="fedfora site request", description=__doc__)
    (arguments,) = parser.parse(argv)
    from fedfora.deployment.certificates import make_request

    path = make_request(Path(arguments.kit), arguments.name)
    print(f"{path}: give it to the coordinator; the keys beside it stay at this site")
    print(f"compare by telephone: {sha256(path.read_bytes()).hexdigest()}")


def show_journal(state: Path) -> list[Line]:
    """Check a kit's journal, print it, and return it."""
    lines = read_journal(state)
    for line in lines:
        print(shown(line))
    print(f"lines: {len(lines)}, each follows the one before; last digest {last_digest(state)}")
    return lines
