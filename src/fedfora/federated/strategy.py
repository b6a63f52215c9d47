"""Flower's Strategy for adapters: draws the sites of a round, and folds their replies into one.

Replies are read one by one as they come, in the order of the sites, so every engine adds up the
same numbers in the same order and a rule that needs only sums holds few adapters in memory. Every
reply is screened before the rule sees it.
"""

import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedfora._seeds import derive_seed
from fedfora.federated.aggregation import Rule, Weighted
from fedfora.federated.reply import ARRAYS, Origin, Report
from fedfora.federated.screening import (
    Accepted,
    Expected,
    Limits,
    RejectedError,
    read_validation,
    screen,
)
from fedfora.federated.transport import Layout, pack, payload_bytes, unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteInfo:
    """What the coordinator knows of a site."""

    node_id: int
    index: int
    name: str
    rows: int
    data_digest: str = ""


@dataclass(frozen=True)
class Contribution:
    """What one site did in one round: its report, the bytes it sent, how far it moved."""

    site: str
    report: Report
    uplink_bytes: int
    norm: float

    def to_line(self) -> dict[str, str | int | float]:
        """Return it flat, as metrics.jsonl holds it."""
        line = {"site": self.site, **vars(self.report)}
        return {**line, "uplink_bytes": self.uplink_bytes, "norm": self.norm}


class RoundWatcher:
    """Whoever wants to know what became of each reply; this one does not."""

    def contributed(self, contribution: Contribution) -> None:
        """A site's update was taken in."""

    def rejected(self, site: str, reason: str) -> None:
        """A site's reply was left out of the round."""


class AdapterStrategy(Strategy):  # type: ignore[misc]  # a Flower interface
    """Seeded sampling, screening, one aggregation rule, weights by trained tokens."""

    def __init__(
        self,
        rule: Rule,
        sites: Iterable[SiteInfo],
        layout: Layout,
        *,
        base_fingerprint: str,
        limits: Limits,
        clients_per_round: int | None,
        deadline_s: float | None,
        seed: int,
        watcher: RoundWatcher,
    ) -> None:
        """Make the strategy.

        Args:
            rule: From `fedfora.federated.aggregation`.
            sites: All sites; their order is that of their indices.
            layout: Layout of the adapters that travel.
            base_fingerprint: Of everybody's base model.
            limits: What is refused.
            clients_per_round: How many sites are drawn for a round; None for all.
            deadline_s: Seconds that a site has for a round; None for no deadline.
            seed: The run's seed.
            watcher: Told what became of each reply.
        """
        self.rule = rule
        self.sites = {site.node_id: site for site in sorted(sites, key=lambda site: site.index)}
        self.layout = layout
        self.base_fingerprint = base_fingerprint
        self.limits = limits
        self.clients_per_round = clients_per_round
        self.deadline_s = deadline_s
        self.seed = seed
        self.watcher = watcher
        self._sent = ArrayRecord()

    def state(self) -> dict[str, Tensor]:
        """Return what must be known to go on after this round, by name: float32 or float64 tensors.

        The place for a server optimizer's moments; averaging keeps nothing.
        """
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned after an earlier round.

        Raises:
            ValueError: If it is not this strategy's.
        """
        if state:
            raise ValueError(f"averaging keeps no state, the checkpoint holds {sorted(state)[:5]}")

    def sample(self, server_round: int) -> list[SiteInfo]:
        """Return the sites of a round, by index; the same seed draws the same sites."""
        sites = list(self.sites.values())
        if self.clients_per_round is None:
            return sites
        rng = random.Random(derive_seed(self.seed, "sample", server_round))
        drawn = rng.sample(sites, min(self.clients_per_round, len(sites)))
        return sorted(drawn, key=lambda site: site.index)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each site of the round."""
        self._sent = arrays
        config = ConfigRecord({"round-index": server_round - 1, **config})
        return self._messages(server_round, MessageType.TRAIN, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies with the rule; without a usable reply there is nothing to return."""
        used: list[Contribution] = []
        try:
            update = self.rule(self._weighted(server_round, replies, used))
        except ValueError:
            if used:
                raise
            logger.warning("round %d: no site sent a usable update", server_round)
            return None, None
        return pack(update, self.layout), _mean_metrics(used)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sites of a round to judge an adapter on the rows that they keep back."""
        return self._messages(server_round, MessageType.EVALUATE, arrays, config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the mean loss over the rows kept back; None where nobody answered."""
        total, tokens = 0.0, 0
        for reply in replies:
            site = self.sites[reply.metadata.src_node_id]
            try:
                loss, answer_tokens = read_validation(reply)
            except RejectedError as error:
                self.watcher.rejected(site.name, f"validation: {error}")
                continue
            total += loss * answer_tokens
            tokens += answer_tokens
        return _validation(total, tokens)

    def summary(self) -> None:
        """Log who takes part."""
        logger.info("%d sites, %d numbers travel", len(self.sites), self.layout.size)

    def _messages(
        self, server_round: int, kind: str, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        content = RecordDict({ARRAYS: arrays, "config": config})
        return [
            Message(content, site.node_id, kind, ttl=self.deadline_s, group_id=str(server_round))
            for site in self.sample(server_round)
        ]

    def _weighted(
        self, server_round: int, replies: Iterable[Message], used: list[Contribution]
    ) -> Iterator[Weighted]:
        sent = unpack(self._sent, self.layout)
        expected = Expected(
            origin=Origin(server_round, self.base_fingerprint, self.layout.digest),
            layout=self.layout,
            example=pack(sent, self.layout),
            sent=sent,
        )
        named = ((self.sites[reply.metadata.src_node_id].name, reply) for reply in replies)
        for accepted in screen(named, expected, self.limits, self.watcher.rejected):
            contribution = _contribution(accepted, payload_bytes(expected.example))
            used.append(contribution)
            self.watcher.contributed(contribution)
            yield accepted.update, float(accepted.report.answer_tokens)


def _contribution(accepted: Accepted[str], uplink_bytes: int) -> Contribution:
    return Contribution(accepted.sender, accepted.report, uplink_bytes, accepted.norm)


def _mean_metrics(used: list[Contribution]) -> MetricRecord:
    reports = [contribution.report for contribution in used]
    tokens = sum(report.answer_tokens for report in reports)
    loss = sum(report.loss * report.answer_tokens for report in reports) / tokens
    metrics = MetricRecord({"loss": loss, "sites": len(used), "answer-tokens": tokens})
    validated = sum(report.validation_tokens for report in reports)
    total = sum(report.validation_loss * report.validation_tokens for report in reports)
    metrics.update(_validation(total, validated) or {})
    return metrics


def _validation(total: float, tokens: int) -> MetricRecord | None:
    return MetricRecord({"validation-loss": total / tokens}) if tokens else None
