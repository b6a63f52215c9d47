"""Engine `ray`: Flower's simulation, where sites work in several processes at a time.

Each process (an actor) loads the base once and keeps it for all sites and rounds that come its way.
Processes can be lost, so this engine survives a site that takes its process down or never comes
back; what it costs is a base for each process. The deadline of a round is wall time here, from when
the sites were asked, with waiting for a free process.

Numbers depend on how many threads add them up, so every actor takes as many as this process has.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfora.config import Scalar
from fedfora.federated.arguments import check_ray
from fedfora.federated.coordinator.receiving import POLL_INTERVAL_S

START_S = 600.0  # longest wait for Flower to register all sites


def run_ray(
    server_app: ServerApp, client_app: ClientApp, num_sites: int, run_config: Mapping[str, Scalar]
) -> None:
    """Run a federation to its end in Flower's simulation.

    Raises:
        ValueError: If ray is not installed.
    """
    check_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # ray reports its use unless told not to
    import torch
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)  # the import set it to DEBUG
    threads = torch.get_num_threads()
    run_simulation(
        server_app=_once_sites_are_there(server_app, num_sites, run_config),
        client_app=_InActor(client_app, dict(run_config), threads),
        num_supernodes=num_sites,
        backend_config={
            "init_args": {"include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": threads, "num_gpus": _share_of_gpus(threads)},
        },
    )


def _share_of_gpus(threads: int) -> float:
    """Return what part of a GPU an actor takes: with any at all, they are shared out evenly."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    actors = max(1, (os.cpu_count() or 1) // threads)
    return min(1.0, torch.cuda.device_count() / actors)


def _once_sites_are_there(
    server_app: ServerApp, num_sites: int, run_config: Mapping[str, Scalar]
) -> ServerApp:
    """Return the app as this engine must start it: it comes up before its sites do.

    And its context has none of the run's settings.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        give_up = time.monotonic() + START_S
        while len(list(grid.get_node_ids())) < num_sites and time.monotonic() < give_up:
            time.sleep(POLL_INTERVAL_S)
        context.run_config = dict(run_config)
        server_app(grid, context)

    return app


@dataclass(frozen=True)
class _InActor:
    """The client app as an actor calls it: with the run's settings, on as many threads as meant."""

    client_app: ClientApp
    run_config: dict[str, Scalar]
    threads: int

    def __call__(self, message: Message, context: Context) -> Message:
        import torch

        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        own = Context(
            context.run_id, context.node_id, context.node_config, context.state, self.run_config
        )
        reply = self.client_app(message, own)
        context.state = own.state
        return reply
