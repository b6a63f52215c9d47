"""Flower's Strategy for adapters: draws the sites of a round, and folds their replies into one.

Replies are read one by one as they come, in the order of the sites, so every engine adds up the
same numbers in the same order and a rule that needs only sums holds one adapter in memory.
"""

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedfora._seeds import derive_seed
from fedfora.federated.aggregation import Rule, Weighted
from fedfora.federated.transport import Layout, pack, payload_bytes, unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteInfo:
    """What the coordinator knows of a site."""

    node_id: int
    index: int
    name: str
    rows: int


@dataclass(frozen=True)
class Contribution:
    """What one site did in one round."""

    site: str
    loss: float
    answer_tokens: int
    tokens: int
    rows: int
    seconds: float
    uplink_bytes: int


class AdapterStrategy(Strategy):  # type: ignore[misc]  # a Flower interface
    """Seeded sampling, one aggregation rule, weights by trained tokens."""

    def __init__(
        self,
        rule: Rule,
        sites: Iterable[SiteInfo],
        layout: Layout,
        *,
        clients_per_round: int | None,
        seed: int,
        on_contribution: Callable[[Contribution], None] = lambda contribution: None,
    ) -> None:
        """Make the strategy.

        Args:
            rule: From `fedfora.federated.aggregation`.
            sites: All sites; their order is that of their indices.
            layout: Layout of the adapters that travel.
            clients_per_round: How many sites are drawn for a round; None for all.
            seed: The run's seed.
            on_contribution: Called with each reply that was taken into the average.
        """
        self.rule = rule
        self.sites = {site.node_id: site for site in sorted(sites, key=lambda site: site.index)}
        self.layout = layout
        self.clients_per_round = clients_per_round
        self.seed = seed
        self.on_contribution = on_contribution

    def sample(self, server_round: int) -> list[SiteInfo]:
        """Return the sites of a round, by index; the same seed draws the same sites."""
        sites = list(self.sites.values())
        if self.clients_per_round is None:
            return sites
        rng = random.Random(derive_seed(self.seed, "sample", server_round))
        return sorted(rng.sample(sites, self.clients_per_round), key=lambda site: site.index)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each site of the round."""
        content = RecordDict(
            {"arrays": arrays, "config": ConfigRecord({"round-index": server_round - 1, **config})}
        )
        return [
            Message(content, site.node_id, MessageType.TRAIN, group_id=str(server_round))
            for site in self.sample(server_round)
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies with the rule; without a usable reply there is nothing to return."""
        used: list[Contribution] = []
        try:
            update = self.rule(self._weighted(replies, used))
        except ValueError:
            if used:
                raise
            logger.warning("round %d: no site sent a usable update", server_round)
            return None, None
        return pack(update, self.layout), _mean_metrics(used)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: the coordinator evaluates on the common test rows."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, as there is nothing to aggregate."""
        return None

    def summary(self) -> None:
        """Log who takes part."""
        logger.info("%d sites, %d numbers travel", len(self.sites), self.layout.size)

    def _weighted(self, replies: Iterable[Message], used: list[Contribution]) -> Iterator[Weighted]:
        for reply in replies:
            site = self.sites[reply.metadata.src_node_id]
            if reply.has_error():
                logger.warning("%s did not finish its round: %s", site.name, reply.error.reason)
                continue
            record = reply.content["arrays"]
            contribution = _contribution(site, reply.content["metrics"], payload_bytes(record))
            update = unpack(record, self.layout)
            used.append(contribution)
            self.on_contribution(contribution)
            yield update, float(contribution.answer_tokens)


def _contribution(site: SiteInfo, metrics: MetricRecord, uplink_bytes: int) -> Contribution:
    return Contribution(
        site=site.name,
        loss=float(metrics["loss"]),
        answer_tokens=int(metrics["answer-tokens"]),
        tokens=int(metrics["tokens"]),
        rows=int(metrics["rows"]),
        seconds=float(metrics["seconds"]),
        uplink_bytes=uplink_bytes,
    )


def _mean_metrics(used: list[Contribution]) -> MetricRecord:
    tokens = sum(c.answer_tokens for c in used)
    loss = sum(c.loss * c.answer_tokens for c in used) / tokens
    return MetricRecord({"loss": loss, "sites": len(used), "answer-tokens": tokens})
