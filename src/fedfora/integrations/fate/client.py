"""A FATE trainer client: what a guest or host does when FATE says that a round is over.

The training loop is fedfora's own. FATE takes part in it through its own callbacks, which speak its
protocol to an unchanged FATE arbiter and call back here; nothing of FATE is replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fate.ml.aggregator import SecureAggregatorClient
from fate.ml.nn.homo.fedavg import FedAVGArguments
from fate.ml.nn.trainer.trainer_base import (
    FedParameterAlignCallback,
    HomoTrainerMixin,
    WrappedFedCallback,
)

from fedfora.adapter.state import AdapterState, fold, read_state, unfold, write_state
from fedfora.integrations.fate.round_sum import contribution, take_out, train_core_alone
from fedfora.integrations.fate.settings import FateArguments
from fedfora.seeds import derive_seed


@dataclass(frozen=True)
class RoundReport:
    """What a round did.

    Args:
        round: Counted from 1.
        own_loss: This party's mean loss over the round's steps.
        loss: The clients' mean, weighted by their rows.
        aggregation_error: Relative to the mean update; None where only the core was trained.
        sent: This party's adapter, folded, before the sum.
        averaged: The adapter after it.
    """

    round: int
    own_loss: float
    loss: float
    aggregation_error: float | None
    sent: AdapterState
    averaged: AdapterState


class FateClient(HomoTrainerMixin):  # type: ignore[misc]  # FATE's interface
    """Hands the adapter to FATE's secure aggregator, and writes the mean back.

    Args:
        ctx: FATE's context.
        model: A PEFT model with a FoRA adapter.
        num_rows: Rows this party trains on: its weight.
        share: Its share of all clients' rows; FATE's arbiter must give it this weight.
        fate: Steps of a round, what trains in it, probes of the error meter.
        seed: The federation's.
        inner_dim: Width M as in `ForaConfig`.
        on_round: Called after every round.
    """

    def __init__(
        self,
        ctx: Any,
        model: Any,
        *,
        num_rows: int,
        share: float,
        fate: FateArguments,
        seed: int,
        inner_dim: int | None,
        on_round: Callable[[RoundReport], None],
    ) -> None:
        fed_args = FedAVGArguments(
            aggregate_strategy="steps",
            aggregate_freq=fate.local_steps,
            aggregator="secure_aggregate",
        )
        super().__init__(
            ctx=ctx,
            model=model,
            training_args=None,
            fed_args=fed_args,
            train_set=None,
            callbacks=[],
        )
        self.num_rows, self.share, self.fate = num_rows, share, fate
        self.seed, self.inner_dim = seed, inner_dim
        self.on_round = on_round
        self.rounds_done = 0
        self._losses: list[float] = []

    def callbacks(self) -> list[Any]:
        """Return FATE's callbacks for a Trainer: start the aggregator, align, aggregate."""
        return [
            WrappedFedCallback(self.ctx, self),
            FedParameterAlignCallback(
                self, self.ctx, training_args=None, fed_args=self._fed_args, is_server=False
            ),
        ]

    def add_loss(self, loss: float) -> None:
        """Count a step's loss into the round's."""
        self._losses.append(loss)

    def init_aggregator(self, ctx: Any, _: Any) -> SecureAggregatorClient:
        """Exchange keys with the other clients (FATE calls this before the first step).

        Raises:
            ValueError: If the arbiter gave this party another weight than its share of the rows.
                An arbiter could read an update that it makes very light, and FATE does not check.
        """
        ctx.arbiter.put("agg_type", "secure_aggregate")  # what FATE's arbiter waits for first
        aggregator = SecureAggregatorClient(
            ctx, aggregator_name="fedavg", aggregate_type="weighted_mean", sample_num=self.num_rows
        )
        weight = aggregator._weight
        if abs(weight - self.share) > 1e-9:
            raise ValueError(
                f"the arbiter gave this party the weight {weight:.6g}; its share of the rows is "
                f"{self.share:.6g}"
            )
        return aggregator

    def on_federation(
        self, ctx: Any, aggregator: Any, _: Any, *, model: Any, optimizer: Any, **__: Any
    ) -> None:
        """Sum with the other clients (FATE calls this at the end of a round).

        The optimizer forgets the round's moments, as that of a site in fedfora's own federation.
        """
        own_loss = sum(self._losses) / len(self._losses)
        seed = derive_seed(self.seed, "round", self.rounds_done)
        probes = {"num_probes": self.fate.error_probes, "seed": seed}
        trained = self.fate.trained_in(self.rounds_done)
        sent = fold(read_state(model))
        arrays = contribution(sent, trained, loss=own_loss, **probes)
        means = aggregator.model_aggregation(ctx, arrays)
        averaged, loss, error = take_out(means, sent, trained, **probes)
        write_state(model, unfold(averaged, seed=self.seed, inner_dim=self.inner_dim))
        optimizer.state.clear()
        self.rounds_done += 1
        if self.fate.trained_in(self.rounds_done) == "core":
            train_core_alone(model)
        self._losses.clear()
        self.on_round(RoundReport(self.rounds_done, own_loss, loss, error, sent, averaged))
