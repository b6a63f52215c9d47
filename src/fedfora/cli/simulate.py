"""fedfora simulate: a whole federation on this machine.

    fedfora simulate --model_name_or_path MODEL --train_file rows.json --test_file test.json
        --partition iid --num_clients 4 --num_rounds 10 --output_dir out/federation

It leaves an adapter as `fedfora train` does. --resume DIRECTORY goes on with a stopped run.
"""

from collections.abc import Sequence

from fedfora.cli.console import announce, silence_libraries
from fedfora.config import ConfigParser
from fedfora.federated.preflight import preflight, resolve_settings, work_of
from fedfora.federated.settings import SECTIONS, FederationSettings


def run(argv: Sequence[str]) -> None:
    """Parse, simulate, and say where the results are."""
    parser = ConfigParser(SECTIONS.values(), prog="fedfora simulate", description=__doc__)
    settings = resolve_settings(argv, parser)
    silence_libraries()
    announce(_plan(settings, preflight(settings)))
    from fedfora.federated.coordinator.checkpoint import next_steps, resume_hint
    from fedfora.federated.simulation import simulate
    from fedfora.reporting.view import View

    try:
        with View(work_of(settings)) as view:
            simulate(settings, view)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(resume_hint(settings.run.output_dir)) from stop
    for line in next_steps(settings.run.output_dir):
        print(line)


def _plan(settings: FederationSettings, names: list[str]) -> str:
    """Return in two lines who is going to train, and what."""
    more = " ..." if len(names) > 8 else ""
    model, federation = settings.model, settings.federation
    return (
        f"{len(names)} sites: {', '.join(names[:8])}{more}\n{federation.num_rounds} rounds of "
        f"{settings.aggregation.aggregation} for {model.model_name_or_path} ({model.quantization})"
    )
