"""fedfora fate: one party of a FATE federation."""

from collections.abc import Sequence

from fedfora.cli.console import announce_loading, silence_libraries
from fedfora.config import ConfigParser
from fedfora.integrations.fate.settings import SECTIONS, FateSettings


def run(argv: Sequence[str]) -> None:
    """Parse, take part, and say where the result is."""
    parser = ConfigParser(SECTIONS.values(), description=__doc__)
    settings = FateSettings(*parser.parse(argv))
    silence_libraries()
    announce_loading("fate")
    from fedfora.integrations.fate.party import check_party, run_party
    from fedfora.reporting.view import View

    role, party_id = check_party(settings)
    fate = settings.fate
    with View(fate.num_rounds * fate.local_steps) as view:
        view.line(f"{role}:{party_id} of {' '.join(fate.parties)}, session {fate.session_id}")
        run_party(settings, view)
    where = "" if role == "arbiter" else f"; adapter and metrics: {settings.run.output_dir}"
    print(f"{role}:{party_id} is done{where}")
