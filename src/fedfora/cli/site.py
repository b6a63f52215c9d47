"""fedfora site: what one site of a real federation runs."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fedfora.cli.quiet import quiet
from fedfora.cli.saying import say
from fedfora.config import ConfigParser, flag
from fedfora.deployment.kit import read_site_kit


@dataclass
class SiteArguments:
    """Which site."""

    kit: str = flag(".", "directory of the site's kit, as `fedfora provision` made it")


def run(argv: Sequence[str]) -> None:
    """Check the kit, and become the daemon that runs the site's processes until told to stop.

    To check the flags takes libraries of models; the daemon does without, so it is another program.
    """
    parser = ConfigParser([SiteArguments], prog="fedfora site", description=__doc__)
    (arguments,) = parser.parse(argv)
    quiet()
    kit = read_site_kit(arguments.kit)
    say(f"site {kit.name} of {kit.federation}, for {kit.host}:{kit.port}; logs: {kit.state}/logs")
    words = [sys.executable, "-m", "fedfora.cli.site_daemon", str(kit.directory)]
    os.execv(sys.executable, words)
