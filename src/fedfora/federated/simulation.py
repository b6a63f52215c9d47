"""A whole federation on this machine: settings to a run directory."""

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedfora.config import Scalar
from fedfora.federated.coordinator.round_view import RoundView
from fedfora.federated.coordinator.rounds import make_server_app
from fedfora.federated.coordinator.strategy import SiteResult
from fedfora.federated.engines.embedded import run_embedded
from fedfora.federated.engines.ray import run_ray
from fedfora.federated.preflight import preflight
from fedfora.federated.settings import FederationSettings
from fedfora.federated.shared_noise import site_noise_multiplier
from fedfora.federated.site.client_app import make_client_app
from fedfora.federated.site_runtime import check_rows, load_runtime
from fedfora.privacy.accounting import Release
from fedfora.registry import Registry
from fedfora.reporting.history import Follower
from fedfora.reporting.view import EVALUATED_ROW, View
from fedfora.training.privacy_plan import open_ledger
from fedfora.training.trainer import StepReport


def simulate(settings: FederationSettings, view: View) -> list[dict[str, Any]]:
    """Run a federation in this process and return its rounds as the run directory records them.

    Everything that can be wrong with the settings is found before the first step.

    Args:
        settings: What to run.
        view: Where to show it.

    Raises:
        ValueError: If rows, model or settings do not work; the message names the flag.
    """
    names = preflight(settings)
    _check_budget(settings)
    run_config = settings.run_config()
    watcher = SimulationView(view, settings)
    client_app = make_client_app()
    if settings.rounds.engine == "embedded":
        client_app = make_client_app(watcher.site_step)
        check_rows(load_runtime(run_config))
        gc.collect()
        gc.freeze()  # what is loaded stays; looking through it again after every site is slow
    ENGINES[settings.rounds.engine](make_server_app(watcher), client_app, len(names), run_config)
    return read_rounds(settings.run.output_dir)


def _check_budget(settings: FederationSettings) -> None:
    """Raise if earlier runs have spent what the first round needs; an earlier run's record stays.

    Raises:
        BudgetSpent: Saying what is left.
    """
    if settings.privacy.privacy_unit == "site" and settings.rounds.resume is None:
        noise = site_noise_multiplier(settings.privacy, num_rounds=settings.federation.num_rounds)
        ledger = open_ledger(settings.privacy, settings.run.output_dir, "sites")
        ledger.check(Release(1.0, noise, 1))


def read_rounds(output_dir: str | Path) -> list[dict[str, Any]]:
    """Return the round lines of a run's metrics.jsonl."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "round"]


@dataclass
class SimulationView(RoundView):
    """Shows the rounds of a federation on a `View`."""

    view: View
    settings: FederationSettings
    label: str = ""
    _since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._record = Follower(self.settings.run.output_dir)

    def resumed(self, round_number: int) -> None:
        """Say where the run goes on."""
        federation = self.settings.federation
        share = round_number / federation.num_rounds
        self.view.advance(share * self.view.total, "resumed")
        self.view.line(f"goes on after round {round_number} of {federation.num_rounds}")

    def absent(self, site: str, reason: str) -> None:
        """Name a site that takes no part."""
        self._read_record()
        self.view.line(f"{site} takes no part: {reason}")

    def rejected(self, site: str, reason: str) -> None:
        """Name a site that is left out of the round."""
        self._read_record()
        self.view.line(f"{self.label:12s} without {site}: {reason}")

    def contributed(self, contribution: SiteResult) -> None:
        """Mark a site whose update has come; show its work where its steps were out of sight."""
        self.view.board.site(contribution.site).state = "sent"
        report = contribution.report
        if report is not None and self.settings.rounds.engine != "embedded":
            hidden = self.settings.privacy.privacy_unit == "record"
            loss = None if hidden else report.loss
            self.view.advance(report.steps, f"{self.label} {contribution.site}", loss=loss)

    def round_started(self, round_number: int, num_rounds: int, sites: list[str]) -> None:
        """Remember which round it is, and who takes part."""
        self.label = f"round {round_number}/{num_rounds}"
        self.view.board.draw(sites)

    def site_step(self, site: str, report: StepReport) -> None:
        """Show a step of a site."""
        if report.step == 1:
            self._since = time.monotonic()
        seconds = time.monotonic() - self._since
        speed = report.tokens / seconds if report.step > 1 else None
        shown = self.view.board.site(site)
        shown.state = f"step {report.step}/{self.settings.federation.local_steps}"
        shown.loss = report.loss
        self.view.advance(1, f"{self.label} {site}", loss=report.loss, speed=speed)

    def evaluated(self, num_rows: int) -> None:
        """Show the evaluation."""
        self.view.advance(num_rows * EVALUATED_ROW, f"{self.label} evaluation")

    def round_finished(
        self,
        round_number: int,
        loss: float | None,
        validation_loss: float | None,
        scores: dict[str, Any],
        aggregation_error: float | None,
    ) -> None:
        """Print the round's line."""
        self._read_record()
        shown_loss = "-" if loss is None else f"{loss:.3f}"
        text = f"{self.label:12s} loss {shown_loss:>6s}"
        if validation_loss is not None:
            text += f"   validation loss {validation_loss:6.3f}"
        if "f1" in scores:
            text += f"   F1 {scores['f1']:.3f}   parse rate {scores['parse_rate']:.3f}"
        elif scores:
            text += f"   exact match {scores['exact_match']:.3f}"
        if "epsilon" in self.view.board.numbers:
            text += f"   epsilon {self.view.board.numbers['epsilon']:.2f}"
        if aggregation_error is not None:
            text += f"   aggregation error {aggregation_error:.2g}"
        self.view.line(text)

    def lost(self, round_number: int, reason: str) -> None:
        """Say why a round came to nothing."""
        self._read_record()
        self.view.line(f"{self.label:12s} lost: {reason}")

    def waiting(self, round_number: int, reason: str, pause_s: float) -> None:
        """Say why a round is tried again, and when."""
        self._read_record()
        self.view.line(f"{self.label:12s} tried again in {pause_s:g} s: {reason}")

    def _read_record(self) -> None:
        """Take in what the run has recorded since."""
        for event in self._record.new():
            self.view.board.take(event)

    def stopped_early(self, best_round: int) -> None:
        """Say why the run ends."""
        patience = self.settings.rounds.early_stopping_patience
        self.view.line(f"nothing better for {patience} rounds after round {best_round}: stopped")


# Engines by name: what carries messages between the coordinator and the simulated sites.
#
# The apps do not know which one runs them, and replies are folded in the order of the sites, so the
# same seed is to give the same adapter to the bit in every engine
# (tests/federated/engines/test_engines.py).


Engine = Callable[[ServerApp, ClientApp, int, Mapping[str, Scalar]], None]

ENGINES: Registry[Engine] = Registry("engine")
ENGINES.add("embedded", run_embedded)
ENGINES.add("ray", run_ray)
