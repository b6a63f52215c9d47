"""fedfora simulate: a whole federation on this machine."""

from collections.abc import Sequence

from fedfora.cli.quiet import quiet
from fedfora.config import ConfigParser
from fedfora.federated.resumption import resolve
from fedfora.federated.settings import SECTIONS


def run(argv: Sequence[str]) -> None:
    """Parse, simulate, and say where the results are."""
    parser = ConfigParser(SECTIONS.values(), prog="fedfora simulate", description=__doc__)
    settings = resolve(argv, parser)
    quiet()
    from fedfora.federated.simulation import check_simulation, simulate, work_of
    from fedfora.reporting.view import View

    names = check_simulation(settings)
    with View(work_of(settings)) as view:
        view.line(f"{len(names)} sites: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}")
        simulate(settings, view)
    print(f"adapter, metrics, report.html: {settings.run.output_dir}")
