"""fedfora site: what one site of a real federation runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedfora.cli.console import log_line, silence_libraries
from fedfora.config import ConfigParser, flag
from fedfora.deployment.kit import read_site_kit


@dataclass
class SiteArguments:
    """Which site."""

    kit: str = flag(".", "directory of the site's kit, as `fedfora provision` made it")


def run(argv: Sequence[str]) -> None:
    """Run the site's processes until told to stop."""
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
