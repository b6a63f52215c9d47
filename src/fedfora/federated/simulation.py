"""A whole federation on this machine: from settings to a run directory."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedfora.federated.coordinator.rounds import make_server_app
from fedfora.federated.coordinator.site_privacy import sites_ledger
from fedfora.federated.embedded import run_embedded
from fedfora.federated.preflight import partition_sites, preflight
from fedfora.federated.secure_aggregation.messages import NUM_CURIOUS_SITES, fewest_survivors
from fedfora.federated.settings import FederationSettings
from fedfora.federated.shared_noise import shared_release
from fedfora.federated.site.client_app import make_client_app
from fedfora.federated.site.training import plan_round
from fedfora.federated.site_runtime import SiteRuntime, check_rows, load_runtime
from fedfora.privacy.ledger import open_ledger
from fedfora.privacy.outlook import noise_to_signal, outlook_line
from fedfora.reporting.history import read_lines
from fedfora.reporting.record import METRICS, PASSING, Listener, append_event
from fedfora.reporting.view import View
from fedfora.training.preflight import ledger_of
from fedfora.training.privacy_plan import PrivateTraining
from fedfora.training.trainer import StepReport

STEP_SHOWN_S = 0.5  # an outside watcher learns of a site's steps at most this often


def simulate(
    settings: FederationSettings,
    view: View,
    own_rows: dict[str, int] | None = None,
    *,
    listeners: Iterable[Listener] = (),
) -> list[dict[str, Any]]:
    """Run a federation in this process and return its rounds as the run directory records them.

    Anything wrong with the settings is found before the first step. `own_rows` are as `preflight`
    takes them; listeners hear every event, besides the view.

    Raises:
        ValueError: If rows, model or settings do not work; the message names the flag.
    """
    names = preflight(settings, own_rows)
    private = None if settings.rounds.resume else _check_budget(settings, names)
    run_config = settings.run_config()
    check_rows(runtime := load_runtime(run_config))
    if settings.privacy.privacy_unit == "record" and not settings.rounds.resume:
        view.line(_outlook(settings, names, runtime, private))
    gc.collect()
    gc.freeze()  # what is loaded stays; collecting garbage in it after every site is slow
    client_app = make_client_app(_site_steps(settings, view))
    run_embedded(make_server_app([view.take, *listeners]), client_app, len(names), run_config)
    return read_rounds(settings.run.output_dir)


def _check_budget(settings: FederationSettings, names: Iterable[str]) -> PrivateTraining | None:
    """Raise if earlier runs have spent what this one needs; an earlier run's record stays.

    Returns:
        How the site with the fewest rows hides its records; None if sites hide none.
    """
    plans = []
    if settings.privacy.privacy_unit == "record":
        examples, parts = partition_sites(settings)
        for rows in parts.values():
            name = ledger_of(examples[row] for row in rows)
            if settings.privacy.shared_noise:
                release = shared_release(settings, settings.federation.num_rounds)
                open_ledger(settings.privacy, name).check(release)
            elif plan := plan_round(settings, name, num_rows=len(rows), first_step=0):
                plan.ledger.check(plan.release(settings.federation.total_steps))
                plans.append(plan)
    if settings.privacy.privacy_unit == "site":
        ledger = open_ledger(settings.privacy, sites_ledger(settings, names))
        # Where the coordinator adds the noise, it adds what the budget left for each round needs.
        adapts = settings.privacy.noise_multiplier is None and not settings.shares_noise
        ledger.check(shared_release(settings, 1 if adapts else settings.federation.num_rounds))
    return min(plans, key=lambda plan: plan.privacy.num_rows, default=None)


def _outlook(
    settings: FederationSettings,
    rows: Mapping[str, int],
    runtime: SiteRuntime,
    private: PrivateTraining | None,
) -> str:
    """Return what to expect of a run with private records, as far as noise goes."""
    sampled = settings.federation.clients_per_round or len(rows)
    warm = settings.adapter.start_adapter is not None
    factors = "ADE" if settings.privacy.shared_noise else "ABCDE"
    trained = sum(
        p.numel()
        for name, p in runtime.model.named_parameters()
        if any(f".fora_{factor}." in name for factor in factors)
    )
    if private is not None:
        steps = settings.federation.total_steps
        return private.outlook(trained, num_steps=steps, public_start=warm, num_sites=sampled)
    nu = noise_to_signal(
        shared_release(settings, settings.federation.num_rounds),
        rows=sum(rows.values()) / len(rows),
        trained=trained,
        sites=sampled,
        shares=fewest_survivors(sampled, settings.secure.secagg_threshold) - NUM_CURIOUS_SITES,
    )
    return outlook_line(nu, public_start=warm)


def read_rounds(output_dir: str | Path) -> list[dict[str, Any]]:
    """Return the round lines of a run's metrics.jsonl."""
    lines = read_lines(Path(output_dir) / METRICS)
    return [line for line in lines if line["event"] == "round"]


def _site_steps(settings: FederationSettings, view: View) -> Callable[[str, StepReport], None]:
    """Return a function that shows the sites' steps, here and now and then to other processes."""
    hidden = settings.privacy.privacy_unit != "none"
    directory, steps = Path(settings.run.output_dir), settings.federation.local_steps
    told = -STEP_SHOWN_S

    def site_step(site: str, report: StepReport) -> None:
        nonlocal told
        values = {"site": site, "steps": steps, **asdict(report)}
        if hidden:
            values["tokens"] = 0
            del values["loss"]
        view.take({"event": "site_step", **values})
        if time.monotonic() - told >= STEP_SHOWN_S:
            told = time.monotonic()
            append_event(directory, "site_step", file=PASSING, **values)

    return site_step
