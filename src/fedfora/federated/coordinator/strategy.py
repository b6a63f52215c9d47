"""Flower's Strategy for adapters: draws the sites of a round, and folds their replies into one.

Replies are read one by one as they come, in the order of the sites, so every engine adds up the
same numbers in the same order and a rule that needs only sums holds few adapters in memory. Every
reply is screened before the rule sees it.
"""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedfora.federated.aggregation import Weighted
from fedfora.federated.aggregation.update import part
from fedfora.federated.coordinator.aggregator import Aggregator
from fedfora.federated.coordinator.receiving import UNREADABLE, printable
from fedfora.federated.coordinator.screening import (
    Limits,
    read_masked,
    read_validation,
    screen,
)
from fedfora.federated.coordinator.secure_rounds import SecureRounds
from fedfora.federated.settings_scope import agreed_part
from fedfora.federated.wire.formats import FORMATS
from fedfora.federated.wire.messages import (
    ExpectedReply,
    Origin,
    Report,
    RoundMessages,
    content_bytes,
)
from fedfora.federated.wire.secure_records import digest_of_task
from fedfora.federated.wire.transport import (
    Layout,
    from_record,
    payload_bytes,
    to_record,
    unflatten,
)
from fedfora.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteInfo:
    """What the coordinator knows of a site; `key_id` names the key it signs with, if it has one."""

    node_id: int
    index: int
    name: str
    rows: int
    rank: int
    data_digest: str = ""
    key_id: str = ""


@dataclass(frozen=True)
class SiteResult:
    """What one site did in one round: its report, the bytes that traveled, how far it moved.

    Under secure aggregation nobody knows a site's report and how far it moved; both are None.
    """

    site: str
    report: Report | None
    uplink_bytes: int
    downlink_bytes: int
    norm: float | None

    def to_line(self) -> dict[str, str | int | float]:
        """Return it flat, as metrics.jsonl holds it."""
        reported = {} if self.report is None else vars(self.report)
        traveled = {"uplink_bytes": self.uplink_bytes, "downlink_bytes": self.downlink_bytes}
        moved = {} if self.norm is None else {"norm": self.norm}
        return {"site": self.site, **reported, **traveled, **moved}


class AdapterStrategy(Strategy):  # type: ignore[misc]  # a Flower interface
    """Seeded sampling and screening; what the sites of a round send becomes one adapter.

    Between rounds the adapter is a record with one array for each tensor (`transport.to_record`),
    which never travels.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        sites: Iterable[SiteInfo],
        layout: Layout,
        *,
        base_fingerprint: str,
        limits: Limits,
        on_used: Callable[[SiteResult], None],
        on_rejected: Callable[[str, str], None],
        secure: SecureRounds | None = None,
    ) -> None:
        """Make the strategy.

        Args:
            aggregator: What makes one adapter of many.
            sites: All sites; their order is that of their indices.
            layout: Layout of the fresh adapter.
            base_fingerprint: Of everybody's base model.
            limits: What is refused.
            on_used: Called with what a site did, when its update is taken in.
            on_rejected: Called with a site and the reason, when its reply is left out.
            secure: Secure aggregation; None where single updates are seen.
        """
        self.aggregator = aggregator
        self.settings = aggregator.settings
        self.sites = {site.node_id: site for site in sorted(sites, key=lambda site: site.index)}
        self.layout = layout
        self.base_fingerprint = base_fingerprint
        self.limits = limits
        self.on_used, self.on_rejected = on_used, on_rejected
        self.secure = secure
        self._exchange: RoundMessages | None = None
        self._frozen_at: dict[int, str] = {}  # node to the digest of the frozen factors it has
        self._downlink_bytes: dict[int, int] = {}

    def state(self) -> dict[str, Tensor]:
        """Return what must be known to go on after this round, by name: float32 or float64 tensors.

        These are the server optimizer's moments; averaging keeps nothing.
        """
        return dict(self.aggregator.optimizer.moments)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned after an earlier round."""
        self.aggregator.optimizer.moments = dict(state)

    def admit(self, site: SiteInfo) -> None:
        """Take a site in from the next round on; it replaces a node with the same number."""
        gone = {node for node, known in self.sites.items() if known.index == site.index}
        sites = [known for node, known in self.sites.items() if node not in gone]
        ordered = sorted([*sites, site], key=lambda known: known.index)
        self.sites = {known.node_id: known for known in ordered}
        if self.secure is not None:
            self.secure.admit(site.node_id, site.index)

    def sample(self, server_round: int) -> list[SiteInfo]:
        """Return the sites of a round, by index; the same seed draws the same sites."""
        sites = list(self.sites.values())
        clients_per_round = self.settings.federation.clients_per_round
        if clients_per_round is None:
            return sites
        rng = random.Random(derive_seed(self.settings.train.seed, "sample", server_round))
        sampled = rng.sample(sites, min(clients_per_round, len(sites)))
        return sorted(sampled, key=lambda site: site.index)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each site of the round."""
        exchange = self._exchange = self._exchange_of(server_round, arrays)
        sampled = self.sample(server_round)
        extra = self._extra(server_round, exchange, sampled, grid)
        contents = {}
        for site in sampled:
            if site.node_id in extra:
                has_frozen = self._frozen_at.get(site.node_id) == exchange.digest
                content = exchange.message(site.rank, has_frozen=has_frozen)
                contents[site.node_id] = RecordDict({**content, **extra[site.node_id]})
        self._downlink_bytes = {node: content_bytes(sent) for node, sent in contents.items()}
        return self._messages(server_round, MessageType.TRAIN, contents)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies with the rule; without a usable reply there is nothing to return."""
        assert self._exchange is not None, "configure_train comes first"
        if self.secure is not None:
            return self._aggregate_sum(server_round, self._exchange, replies, self.secure)
        used: list[SiteResult] = []
        weighted = self._weighted(server_round, self._exchange, replies, used)
        try:
            adapter, reading = self.aggregator.aggregate(self._exchange, weighted)
        except ValueError:
            if used:
                raise
            logger.warning("round %d: no site sent a usable update", server_round)
            return None, None
        metrics = _mean_metrics(used)
        if reading is not None:
            metrics.update(reading.to_metrics())
        return to_record(adapter), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sites of a round to judge an adapter on the rows that they keep back."""
        exchange = self._exchange_of(server_round, arrays)
        contents = {
            site.node_id: exchange.message(site.rank, has_frozen=False)
            for site in self.sample(server_round)
        }
        return self._messages(server_round, MessageType.EVALUATE, contents)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the mean loss over the rows kept back; None where nobody answered."""
        total, tokens = 0.0, 0
        for reply in replies:
            site = self.sites[reply.metadata.src_node_id]
            try:
                loss, answer_tokens = read_validation(reply)
            except UNREADABLE as error:
                self.on_rejected(site.name, f"validation: {printable(error)}")
                continue
            total += loss * answer_tokens
            tokens += answer_tokens
        return _validation(total, tokens)

    def summary(self) -> None:
        """Log who takes part."""
        logger.info("%d sites, an adapter of %d numbers", len(self.sites), self.layout.size)

    def _exchange_of(self, server_round: int, arrays: ArrayRecord) -> RoundMessages:
        return RoundMessages(
            self.settings.rule_of_round(server_round - 1),
            from_record(arrays),
            FORMATS[self.settings.aggregation.update_dtype],
            round_index=server_round - 1,
        )

    def _messages(
        self, server_round: int, kind: str, contents: dict[int, RecordDict]
    ) -> list[Message]:
        ttl = self.settings.rounds.round_deadline
        return [
            Message(content, node_id, kind, ttl=ttl, group_id=str(server_round))
            for node_id, content in contents.items()
        ]

    def _extra(
        self, server_round: int, exchange: RoundMessages, sampled: list[SiteInfo], grid: Grid
    ) -> Mapping[int, Mapping[str, ConfigRecord]]:
        """Return, for each site that is asked to train, what secure aggregation tells it."""
        if self.secure is None:
            return {site.node_id: {} for site in sampled}
        rule = exchange.rule
        received = part(exchange.adapter, rule.travels + rule.frozen)
        task = digest_of_task(rule.name, received, agreed_part(self.settings.run_config()))
        nodes = [site.node_id for site in sampled]
        size = Layout.of(exchange.current).size
        return self.secure.open(grid, server_round, nodes, size, task)

    def _aggregate_sum(
        self,
        server_round: int,
        exchange: RoundMessages,
        replies: Iterable[Message],
        secure: SecureRounds,
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Fold what the sum of the masked updates says; how far it misses, nobody can tell."""
        origin = Origin(server_round, self.base_fingerprint, self.layout.digest)
        num_accepted = 0
        for reply in replies:
            site = self.sites[reply.metadata.src_node_id]
            try:
                masked = read_masked(reply, origin)
                secure.take(site.node_id, masked)
            except UNREADABLE as error:
                self._frozen_at.pop(site.node_id, None)
                self.on_rejected(site.name, printable(error))
                continue
            num_accepted += 1
            self._frozen_at[site.node_id] = exchange.digest
            uplink_bytes = payload_bytes(masked) + secure.uplink_bytes(site.node_id)
            downlink_bytes = self._downlink_bytes[site.node_id]
            self.on_used(SiteResult(site.name, None, uplink_bytes, downlink_bytes, None))
        summed = secure.close()
        change = unflatten(summed.mean_N.astype(np.float32), Layout.of(exchange.current))
        update = {name: value + change[name] for name, value in exchange.current.items()}
        adapter, _ = self.aggregator.aggregate(exchange, [(update, float(summed.weight))])
        return to_record(adapter), MetricRecord({"loss": summed.loss, "sites": num_accepted})

    def _weighted(
        self,
        server_round: int,
        exchange: RoundMessages,
        replies: Iterable[Message],
        used: list[SiteResult],
    ) -> Iterator[Weighted]:
        origin = Origin(server_round, self.base_fingerprint, self.layout.digest)

        def expected(site: SiteInfo) -> ExpectedReply:
            return exchange.expected(site.rank, origin)

        def rejected(site: SiteInfo, reason: str) -> None:
            self._frozen_at.pop(site.node_id, None)  # it may have lost them
            self.on_rejected(site.name, reason)

        named = ((self.sites[reply.metadata.src_node_id], reply) for reply in replies)
        for accepted in screen(named, expected, self.limits, rejected):
            site = accepted.sender
            self._frozen_at[site.node_id] = exchange.digest
            contribution = SiteResult(
                site.name,
                accepted.report,
                uplink_bytes=payload_bytes(expected(site).example),
                downlink_bytes=self._downlink_bytes[site.node_id],
                norm=accepted.norm,
            )
            used.append(contribution)
            self.on_used(contribution)
            yield accepted.update, _weight(accepted.report, self.settings.aggregation.weighting)


def _weight(report: Report, weighting: str) -> float:
    """Return a site's weight: by "tokens" trained on, by "rows", or "equal"."""
    return float({"tokens": report.answer_tokens, "rows": report.rows, "equal": 1}[weighting])


def _mean_metrics(used: list[SiteResult]) -> MetricRecord:
    reports = [contribution.report for contribution in used if contribution.report is not None]
    tokens = sum(report.answer_tokens for report in reports)
    loss = sum(report.loss * report.answer_tokens for report in reports) / tokens
    metrics = MetricRecord({"loss": loss, "sites": len(used), "answer-tokens": tokens})
    validated = sum(report.validation_tokens for report in reports)
    total = sum(report.validation_loss * report.validation_tokens for report in reports)
    metrics.update(_validation(total, validated) or {})
    return metrics


def _validation(total: float, tokens: int) -> MetricRecord | None:
    return MetricRecord({"validation-loss": total / tokens}) if tokens else None
