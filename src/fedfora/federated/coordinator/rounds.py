"""The rounds of a federation, from any checkpoint on: train, screen, fold, judge, record, keep.

The order within a round decides what a kill can do. The round's lines go to metrics.jsonl, then
the checkpoint appears, then `best` and old checkpoints follow it. A resumed run cuts metrics.jsonl
where the checkpoint says and repeats what came after; since every draw derives from the seed and
the round, it arrives at the same numbers.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors import SafetensorError

from fedfora.adapter.state import unfold
from fedfora.config import Scalar
from fedfora.federated.aggregation.update import AdapterState, rank_of
from fedfora.federated.coordinator.aggregator import Aggregator
from fedfora.federated.coordinator.checkpoint import (
    FederationState,
    forget_earlier_run,
    forget_halves,
    load_checkpoint,
    prune,
    publish_best,
    save_checkpoint,
)
from fedfora.federated.coordinator.exchange import NoQuorum, SiteExchange, public
from fedfora.federated.coordinator.handshake import (
    SITE_TABLE,
    Agreement,
    Handshake,
    Membership,
    base_of,
    check_same_world,
)
from fedfora.federated.coordinator.judging import judge
from fedfora.federated.coordinator.site_privacy import record_event, site_privacy_of, sites_ledger
from fedfora.federated.secure_aggregation.messages import fewest_survivors
from fedfora.federated.secure_aggregation.server import RoundLost, WrongShares
from fedfora.federated.settings import NO_EFFECT, FederationSettings, from_run_config
from fedfora.models.adapter_base import start_note
from fedfora.models.loading import fora_config
from fedfora.models.saving import as_saved, config_at_rank, save_adapter
from fedfora.privacy.ledger import open_ledger
from fedfora.reporting.record import Listener, RunRecord
from fedfora.reporting.report import finish_run
from fedfora.reporting.trackers import trackers

FIRST_WAIT_S, LONGEST_WAIT_S = 10.0, 600.0  # before a round is retried, each twice the last


def run_rounds(
    grid: Grid,
    run_config: Mapping[str, Scalar],
    listeners: Iterable[Listener] = (),
    members: Membership | None = None,
) -> None:
    """Agree with the sites, then run all rounds that are still to be run.

    Raises:
        ValueError: If most sites hold no common base model, a round has no quorum for
            `--quorum_wait` seconds, or the run directory cannot be written; what is finished is
            kept, and the run can be resumed.
    """
    settings = from_run_config(run_config)
    directory = Path(settings.run.output_dir)
    resuming = settings.rounds.resume is not None
    progress = load_checkpoint(directory) if resuming else None
    listeners = [*listeners, *trackers(settings.rounds.report_to, directory, run_config)]
    kept = (progress.metrics_bytes if progress else 0) if resuming else None
    overwrite = settings.run.overwrite_output_dir
    record = RunRecord(directory, overwrite=overwrite, listeners=listeners, kept_bytes=kept)
    if not resuming:
        forget_earlier_run(directory)
        record.write_config(asdict(settings), NO_EFFECT)
    members = members or Membership()
    handshake = Handshake(
        grid,
        members,
        settings.rounds.start_deadline,
        on_absent=lambda site, reason: record.log("absent", site=site, reason=reason),
    )
    agreement = handshake.agree(
        base_fingerprint=base_of(directory) if progress else None,
        same_bits=settings.rule.start == "zero",
    )
    hidden = settings.hides_sites
    if progress is None:
        record.write_environment(
            seed=settings.train.seed, base_fingerprint=agreement.base_fingerprint
        )
        record.write_json(SITE_TABLE, agreement.site_table(hidden=hidden))
        progress = FederationState(0, agreement.first)
    else:
        check_same_world(directory, agreement, may_grow=members.grows, hidden=hidden)
        num_rounds = settings.federation.num_rounds
        record.log("resumed", after_round=progress.round_number, num_rounds=num_rounds)
    _Rounds(grid, settings, record, agreement, handshake).run(progress)


class _Rounds:
    """The rounds of one run."""

    def __init__(
        self,
        grid: Grid,
        settings: FederationSettings,
        record: RunRecord,
        agreement: Agreement,
        handshake: Handshake,
    ) -> None:
        self.settings, self.record = settings, record
        self.agreement, self.handshake = agreement, handshake
        self._since: float | None = None  # since when no round has had enough sites
        names = [site.name for site in agreement.sites]
        num_sampled = settings.federation.clients_per_round or len(names)
        fewest = fewest_survivors(num_sampled, settings.secure.secagg_threshold)
        # How many sites share the noise of a sum, at least; 0 if none do.
        self.min_noise_shares = fewest if settings.shares_noise else 0
        self.site_privacy = site_privacy_of(
            settings.privacy,
            open_ledger(settings.privacy, sites_ledger(settings, names)),
            run=str(record.directory.resolve()),
            num_sites=num_sampled,
            num_rounds=settings.federation.num_rounds,
            min_noise_shares=self.min_noise_shares,
        )
        # If the noise is shared, the sites have clipped already, and the sum is noisy.
        self.aggregator = Aggregator(settings, None if self.min_noise_shares else self.site_privacy)
        self.exchange = SiteExchange(grid, self.aggregator, agreement, record)

    def run(self, progress: FederationState) -> None:
        """Run the rounds after `progress`, and leave the last adapter in the run directory."""
        self.aggregator.optimizer.moments = dict(progress.server)
        forget_halves(self.record.directory)
        self._follow(progress)
        patience = self.settings.rounds.early_stopping_patience
        while progress.round_number < self.settings.federation.num_rounds:
            if progress.selection.is_over(patience):
                self.record.log("stopped_early", best_round=progress.selection.best_round)
                break
            last_round, directory = progress.round_number, self.record.directory
            try:
                progress = self._play_or_lose(progress)
                save = partial(self._save_adapter, progress.adapter)
                save_checkpoint(directory, progress, save)
                self._follow(progress)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"round {last_round + 1}: the run directory cannot be written: {error}. Rounds "
                    f"up to {last_round} are kept: make room and resume with --resume {directory}"
                ) from error
        self._save_adapter(progress.adapter, self.record.directory)
        self.record.no_round()
        finish_run(self.record)

    def _play_or_lose(self, before: FederationState) -> FederationState:
        """Play a round, and retry it if too few sites were there, for up to `--quorum_wait`.

        Under secure aggregation no round is repeated: the same sites would send the same updates
        without a missing one, and the difference would be that site's own. The next round goes on
        without what this one would have taught.
        """
        number, pause_s = before.round_number + 1, FIRST_WAIT_S
        while True:
            try:
                after = self._play(before)
                self._since = None
                return after
            except WrongShares as error:
                return self._lost(before, error)
            except (NoQuorum, RoundLost) as error:
                now = time.monotonic()
                self._since = now if self._since is None else self._since
                if now - self._since >= (self.settings.rounds.quorum_wait or 0.0):
                    raise
                self.record.log("waiting", round=number, reason=str(error), pause=pause_s)
                time.sleep(pause_s)
                if self.exchange.secure is not None:
                    return self._lost(before, error)
            pause_s = min(2 * pause_s, LONGEST_WAIT_S)
            self.aggregator.optimizer.moments = dict(before.server)

    def _lost(self, before: FederationState, error: Exception) -> FederationState:
        """Continue with the next round from the state before this one."""
        number = before.round_number + 1
        self.record.log("lost", round=number, reason=str(error))
        return replace(before, round_number=number, metrics_bytes=self.record.metrics_bytes())

    def _play(self, before: FederationState) -> FederationState:
        """Train, fold and judge one round."""
        number, exchange = before.round_number + 1, self.exchange
        self._let_in(number)
        if self.site_privacy is not None:
            self.site_privacy.begin(number)
        folded = exchange.train(number, before.adapter)
        selection, judged = judge(exchange, before.selection, number, folded)
        reading = folded.reading
        self.record.log(
            "round",
            round=number,
            rule=self.settings.rule.name,
            **public(
                self.settings, {"loss": folded.loss, **({} if reading is None else vars(reading))}
            ),
            sites=exchange.used,
            rejected=exchange.rejected,
            **self._secure_line(),
            **self._privacy_line(),
            uplink_bytes=sum(line["uplink_bytes"] for line in exchange.used),
            downlink_bytes=sum(line["downlink_bytes"] for line in exchange.used),
            **judged,
        )
        server = dict(self.aggregator.optimizer.moments)
        return FederationState(
            number, folded.adapter, server, selection, self.record.metrics_bytes()
        )

    def _let_in(self, number: int) -> None:
        """Admit the sites that may join before this round."""
        for site in self.handshake.late_joiners(number, self.exchange.sites, self.agreement):
            self.exchange.admit(site)
            self.record.log("joined", round=number, site=site.name)
            self.agreement = replace(self.agreement, sites=list(self.exchange.sites.values()))
            table = self.agreement.site_table(hidden=self.settings.hides_sites)
            self.record.write_json(SITE_TABLE, table)

    def _secure_line(self) -> dict[str, Any]:
        """Return what the sum of a round says; of hidden sites, nothing that counts theirs."""
        if (secure := self.exchange.secure) is None:
            return {}
        hidden = self.settings.hides_sites or self.min_noise_shares
        private = {"clipped_numbers", "shortened_updates"} if hidden else set()
        line = {name: value for name, value in secure.line.items() if name not in private}
        return {"secure_aggregation": line}

    def _follow(self, progress: FederationState) -> None:
        """Bring `best` and the older checkpoints in line with the newest checkpoint."""
        directory, best_round = self.record.directory, progress.selection.best_round
        if best_round:
            publish_best(directory, best_round)
        prune(directory, keep=self.settings.rounds.save_total_limit, best_round=best_round)

    def _save_adapter(self, adapter: AdapterState, directory: Path) -> None:
        seed, inner_dim = self.settings.train.seed, self.settings.adapter.inner_dim
        state = unfold(adapter, seed=seed, inner_dim=inner_dim)
        layout, base = self.agreement.layout, dict(self.agreement.record["base"])
        base["name"] = self.settings.model.model_name_or_path or base["name"]
        start: bool | Literal["svd"] = self.settings.rule.start != "svd" or "svd"
        config = as_saved(
            fora_config(self.settings.adapter, base["name"], init_weights=start),
            target_modules=sorted({name.split(".")[-2] for name, _ in layout.shapes}),
        )
        config = config_at_rank(config, rank_of(adapter))
        record = {**self.agreement.record, "base": base, **self._facts()}
        save_adapter(directory, state, config, record)

    def _facts(self) -> dict[str, Any]:
        """Return how the adapter came about, for its signed record."""
        settings, privacy = self.settings, self._privacy_line()
        facts = {
            "aggregation": settings.aggregation.aggregation,
            "num_rounds": settings.federation.num_rounds,
            "sites": [site.name for site in self.agreement.sites],
            "data_digests": [
                "" if settings.hides_sites else site.data_digest for site in self.agreement.sites
            ],
            "site_keys": [site.key_id for site in self.agreement.sites],
        }
        return facts | ({"privacy": privacy["privacy_statement"]} if privacy else {})

    def _privacy_line(self) -> dict[str, Any]:
        """Return what has been spent of the privacy budget, and the guarantee in words."""
        settings = self.settings
        if settings.privacy.privacy_unit == "none":
            return {}
        if self.site_privacy is not None:
            event = self.site_privacy.event()
        else:
            event = record_event(
                settings.privacy,
                (site.rows for site in self.agreement.sites),
                rate_of=partial(settings.train.sampling_rate, settings.privacy),
                total_steps=settings.federation.total_steps,
                min_noise_shares=self.min_noise_shares,
            )
        event["privacy_statement"] = f"{event['privacy_statement']}{start_note(settings.adapter)}"
        return event


# The coordinator's side of the federation, as a Flower ServerApp.
# The coordinator needs no model: names, shapes and the first adapter come from the sites. Only to
# score the global adapter on test rows does it open the base; in one process, the sites' own.


def make_server_app(listeners: Iterable[Listener] = ()) -> ServerApp:
    """Return the app."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        """Run all rounds."""
        run_rounds(grid, context.run_config, listeners)

    return app
