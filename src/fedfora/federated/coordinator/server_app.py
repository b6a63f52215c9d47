"""The coordinator's side of the federation, as a Flower ServerApp.

The coordinator needs no model: names, shapes and the first adapter come from the sites. Only to
score the global adapter on test rows does it open the base, in one process the sites' own.
"""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfora.federated.coordinator.round_view import RoundView
from fedfora.federated.coordinator.rounds import run_rounds


def make_server_app(view: RoundView | None = None) -> ServerApp:
    """Return the app."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        """Run all rounds."""
        run_rounds(grid, context.run_config, view or RoundView())

    return app


app = make_server_app()
