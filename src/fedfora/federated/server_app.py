"""The coordinator's side of the federation, as a Flower ServerApp: rounds, records, evaluation.

The coordinator needs no model: names, shapes and the first adapter come from the sites. Only to
score the global adapter on test rows does it open the base, in one process the sites' own.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid, ServerApp

from fedfora.adapter.state import unfold
from fedfora.data.loading import load_examples
from fedfora.evaluation.evaluate import evaluate
from fedfora.federated.aggregation import Update
from fedfora.federated.aggregation.update import rank_of
from fedfora.federated.aggregator import Aggregator
from fedfora.federated.settings import FederationSettings, from_run_config
from fedfora.federated.site import open_workplace
from fedfora.federated.strategy import AdapterStrategy, Contribution, SiteInfo
from fedfora.federated.transport import Layout, from_record, to_record, unpack
from fedfora.models.saving import config_at_rank, save_adapter
from fedfora.reporting.record import RunRecord

POLL_INTERVAL_S = 0.5


class RoundView:
    """Whoever watches a federation; this one looks away."""

    def round_started(self, round_number: int, num_rounds: int, sites: list[str]) -> None:
        """A round begins with these sites."""

    def contributed(self, contribution: Contribution) -> None:
        """A site's update was taken in."""

    def evaluated(self, num_rows: int) -> None:
        """So many more test rows were answered."""

    def round_finished(
        self, round_number: int, loss: float, scores: dict[str, Any], errors: dict[str, float]
    ) -> None:
        """A round is over; `scores` is empty where nothing was evaluated, `errors` not measured."""


@dataclass(frozen=True)
class Agreement:
    """What the coordinator and the sites agreed on before the first round."""

    sites: list[SiteInfo]
    layout: Layout
    first: ArrayRecord
    adapter_config: dict[str, Any]
    record: dict[str, Any]


def make_server_app(view: RoundView | None = None) -> ServerApp:
    """Return the app."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        """Run all rounds."""
        run_rounds(grid, context, view or RoundView())

    return app


def run_rounds(grid: Grid, context: Context, view: RoundView) -> None:
    """Agree with the sites, then train, aggregate, save and evaluate round after round.

    Raises:
        ValueError: If the sites hold different base models, or no site answers in a round.
    """
    settings = from_run_config(context.run_config)
    federation = settings.federation
    record = RunRecord(settings.run.output_dir, overwrite=settings.run.overwrite_output_dir)
    record.write_config({name: asdict(getattr(settings, name)) for name in asdict(settings)})
    agreement = agree(grid)
    record.write_environment(
        seed=settings.train.seed, base_fingerprint=agreement.record["base_fingerprint"]
    )
    contributions: list[Contribution] = []

    def take(contribution: Contribution) -> None:
        contributions.append(contribution)
        view.contributed(contribution)

    strategy = AdapterStrategy(
        Aggregator(settings),
        agreement.sites,
        on_contribution=take,
    )
    arrays = to_record(unpack(agreement.first, agreement.layout))
    for number in range(1, federation.num_rounds + 1):
        contributions.clear()
        view.round_started(
            number, federation.num_rounds, [site.name for site in strategy.sample(number)]
        )
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        aggregated, metrics = strategy.aggregate_train(number, receive(grid, messages))
        if aggregated is None or metrics is None:
            raise ValueError(f"round {number}: no site sent a usable update; see the log")
        arrays = aggregated
        _save(record.directory / f"round-{number:03d}", from_record(arrays), agreement, settings)
        due = number % federation.eval_rounds == 0 or number == federation.num_rounds
        scores = _evaluate(from_record(arrays), context, view) if due else {}
        record.log(
            "round",
            round=number,
            rule=settings.rule_of_round(number - 1).name,
            loss=metrics["loss"],
            **aggregation_error(metrics),
            sites=[asdict(c) for c in contributions],
            uplink_bytes=sum(c.uplink_bytes for c in contributions),
            downlink_bytes=sum(c.downlink_bytes for c in contributions),
            scores=scores,
        )
        view.round_finished(number, float(metrics["loss"]), scores, aggregation_error(metrics))
    _save(record.directory, from_record(arrays), agreement, settings)


def agree(grid: Grid) -> Agreement:
    """Ask every site what it has, and one of them for the fresh adapter.

    Raises:
        ValueError: If a site does not answer, or two sites differ in base model or adapter.
    """
    node_ids = list(grid.get_node_ids())
    questions = [
        Message(
            RecordDict({"ask": ConfigRecord({"adapter": node_id == node_ids[0]})}),
            node_id,
            MessageType.QUERY,
        )
        for node_id in node_ids
    ]
    replies = list(receive(grid, questions))
    if failed := [reply for reply in replies if reply.has_error()]:
        raise ValueError(f"{len(failed)} sites could not start: {failed[0].error.reason}")
    described = {reply.metadata.src_node_id: reply.content["site"] for reply in replies}
    for what in ("base-fingerprint", "layout-digest"):
        if len({site[what] for site in described.values()}) > 1:
            raise ValueError(f"the sites differ in their {what}: {_by_value(described, what)}")
    first = replies[0].content
    form = first["form"]
    return Agreement(
        sites=[
            SiteInfo(
                node_id,
                int(site["index"]),
                str(site["name"]),
                rows=int(site["rows"]),
                rank=int(site["rank"]),
            )
            for node_id, site in described.items()
        ],
        layout=Layout.from_json(form["layout"]),
        first=first["fresh"],
        adapter_config=json.loads(form["adapter-config"]),
        record=json.loads(form["record"]),
    )


def receive(grid: Grid, messages: list[Message]) -> Iterator[Message]:
    """Send messages and yield the replies in the order of the messages, as soon as that allows."""
    message_ids = list(grid.push_messages(messages))
    pending = dict.fromkeys(message_ids)
    arrived: dict[str, Message] = {}
    for message_id in message_ids:
        while message_id in pending:
            replies = list(grid.pull_messages(list(pending)))
            for reply in replies:
                arrived[reply.metadata.reply_to_message_id] = reply
                del pending[reply.metadata.reply_to_message_id]
            if not replies:
                time.sleep(POLL_INTERVAL_S)
        yield arrived.pop(message_id)


def aggregation_error(metrics: MetricRecord) -> dict[str, float]:
    """Return what the error meter showed, as metrics.jsonl names it; nothing where it slept."""
    names = ("aggregation-error", "aggregation-error-of-step", "attainable-error")
    return {name.replace("-", "_"): float(metrics[name]) for name in names if name in metrics}


def _evaluate(adapter: Update, context: Context, view: RoundView) -> dict[str, Any]:
    settings = from_run_config(context.run_config)
    if settings.data.test_file is None:
        return {}
    examples = load_examples(settings.data.test_file, settings.data)
    workplace = open_workplace(context.run_config)
    workplace.load(adapter)
    return evaluate(
        workplace.model,
        workplace.base.tokenizer,
        examples[: settings.evaluation.max_eval_samples],
        workplace.prompts,
        batch_size=settings.evaluation.per_device_eval_batch_size,
        max_new_tokens=settings.evaluation.max_new_tokens,
        on_batch=view.evaluated,
    ).scores


def _save(
    directory: Path, adapter: Update, agreement: Agreement, settings: FederationSettings
) -> None:
    state = adapter
    if settings.rule_of_round(0).folds:
        state = unfold(adapter, seed=settings.train.seed, inner_dim=settings.adapter.inner_dim)
    config = config_at_rank(agreement.adapter_config, rank_of(adapter))
    save_adapter(directory, state, config, agreement.record)


def _by_value(described: dict[int, ConfigRecord], what: str) -> str:
    names: dict[str, list[str]] = {}
    for site in described.values():
        names.setdefault(str(site[what]), []).append(str(site["name"]))
    return "; ".join(f"{value}: {', '.join(sites[:5])}" for value, sites in names.items())


app = make_server_app()
