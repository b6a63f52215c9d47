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
from torch import Tensor

from fedfora._seeds import derive_seed
from fedfora.federated.aggregation import Weighted
from fedfora.federated.aggregator import Aggregator
from fedfora.federated.exchange import Exchange, content_bytes
from fedfora.federated.formats import FORMATS
from fedfora.federated.transport import from_record, payload_bytes, to_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteInfo:
    """What the coordinator knows of a site."""

    node_id: int
    index: int
    name: str
    rows: int
    rank: int


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
    downlink_bytes: int

    def weight(self, weighting: str) -> float:
        """Return the site's weight: by "tokens" trained on, by "rows", or "equal"."""
        return {"tokens": float(self.answer_tokens), "rows": float(self.rows), "equal": 1.0}[
            weighting
        ]


class AdapterStrategy(Strategy):  # type: ignore[misc]  # a Flower interface
    """Seeded sampling; what the sites of a round send becomes one adapter.

    Between rounds the adapter is a record with one array for each tensor (`transport.to_record`),
    which never travels.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        sites: Iterable[SiteInfo],
        *,
        on_contribution: Callable[[Contribution], None] = lambda contribution: None,
    ) -> None:
        """Make the strategy.

        Args:
            aggregator: What makes one adapter of many.
            sites: All sites; their order is that of their indices.
            on_contribution: Called with each reply that was taken into the average.
        """
        self.aggregator = aggregator
        self.settings = aggregator.settings
        self.sites = {site.node_id: site for site in sorted(sites, key=lambda site: site.index)}
        self.on_contribution = on_contribution
        self._exchange: Exchange | None = None
        self._sent: dict[int, RecordDict] = {}
        self._frozen_at: dict[int, str] = {}  # node to the digest of the frozen factors it has

    def sample(self, server_round: int) -> list[SiteInfo]:
        """Return the sites of a round, by index; the same seed draws the same sites."""
        sites = list(self.sites.values())
        drawn = self.settings.federation.clients_per_round
        if drawn is None:
            return sites
        rng = random.Random(derive_seed(self.settings.train.seed, "sample", server_round))
        return sorted(rng.sample(sites, drawn), key=lambda site: site.index)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each site of the round."""
        exchange = self._exchange = Exchange(
            self.settings.rule_of_round(server_round - 1),
            from_record(arrays),
            FORMATS[self.settings.aggregation.update_dtype],
            seed=self.settings.train.seed,
            round_index=server_round - 1,
        )
        self._sent = {
            site.node_id: exchange.message(
                site.rank, has_frozen=self._frozen_at.get(site.node_id) == exchange.digest
            )
            for site in self.sample(server_round)
        }
        return [
            Message(content, node_id, MessageType.TRAIN, group_id=str(server_round))
            for node_id, content in self._sent.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies with the rule; without a usable reply there is nothing to return."""
        assert self._exchange is not None, "configure_train comes first"
        used: list[Contribution] = []
        weighted = self._weighted(self._exchange, replies, used)
        try:
            adapter, reading = self.aggregator.aggregate(self._exchange, weighted)
        except ValueError:
            if used:
                raise
            logger.warning("round %d: no site sent a usable update", server_round)
            return None, None
        metrics = _mean_metrics(used)
        if reading is not None:
            metrics["aggregation-error"] = reading.error
            metrics["aggregation-error-of-step"] = reading.error_of_step
            metrics["attainable-error"] = reading.attainable
        return to_record(adapter), metrics

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
        logger.info("%d sites", len(self.sites))

    def state(self) -> dict[str, Tensor]:
        """Return what must outlive this process beside the adapter: the server's moments."""
        return dict(self.aggregator.optimizer.moments)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        self.aggregator.optimizer.moments = dict(state)

    def _weighted(
        self, exchange: Exchange, replies: Iterable[Message], used: list[Contribution]
    ) -> Iterator[Weighted]:
        for reply in replies:
            site = self.sites[reply.metadata.src_node_id]
            if reply.has_error():
                logger.warning("%s did not finish its round: %s", site.name, reply.error.reason)
                self._frozen_at.pop(site.node_id, None)  # it may have lost them
                continue
            record = reply.content["arrays"]
            contribution = _contribution(
                site,
                reply.content["metrics"],
                uplink_bytes=payload_bytes(record),
                downlink_bytes=content_bytes(self._sent[site.node_id]),
            )
            update = exchange.read(record, site.rank)
            self._frozen_at[site.node_id] = exchange.digest
            used.append(contribution)
            self.on_contribution(contribution)
            yield update, contribution.weight(self.settings.aggregation.weighting)


def _contribution(
    site: SiteInfo, metrics: MetricRecord, *, uplink_bytes: int, downlink_bytes: int
) -> Contribution:
    return Contribution(
        site=site.name,
        loss=float(metrics["loss"]),
        answer_tokens=int(metrics["answer-tokens"]),
        tokens=int(metrics["tokens"]),
        rows=int(metrics["rows"]),
        seconds=float(metrics["seconds"]),
        uplink_bytes=uplink_bytes,
        downlink_bytes=downlink_bytes,
    )


def _mean_metrics(used: list[Contribution]) -> MetricRecord:
    tokens = sum(c.answer_tokens for c in used)
    loss = sum(c.loss * c.answer_tokens for c in used) / tokens
    return MetricRecord({"loss": loss, "sites": len(used), "answer-tokens": tokens})
