"""The coordinator's arithmetic of a round: rule, server optimizer and error meter together.

Knows updates and weights, and nothing of messages.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from fedfora.federated.aggregation.means import ErrorMeter, Reading
from fedfora.federated.aggregation.robust import robust
from fedfora.federated.aggregation.server_optimizer import ServerOptimizer
from fedfora.federated.aggregation.update import AdapterState, Weighted
from fedfora.federated.coordinator.site_privacy import SitePrivacy
from fedfora.federated.settings import FederationSettings
from fedfora.federated.wire.messages import RoundMessages
from fedfora.training.privacy_plan import rate_for_noise
from fedfora.training.schedule import StepWindow, scheduler_from

logger = logging.getLogger(__name__)

NOTABLE_ERROR = 0.1  # of the mean update; from here on another rule is worth considering


@dataclass
class Aggregator:
    """Folds the updates of round after round into the global adapter.

    Args:
        site_privacy: Clipping and noise that hide single sites; None for neither.
        optimizer: The server optimizer; its moments are the only state from round to round.
    """

    settings: FederationSettings
    site_privacy: SitePrivacy | None = None
    optimizer: ServerOptimizer = field(init=False)
    _said: bool = False

    def __post_init__(self) -> None:
        chosen = self.settings.aggregation
        self.optimizer = ServerOptimizer(
            chosen.server_optimizer,
            learning_rate=chosen.server_learning_rate,
            momentum=chosen.server_momentum,
            beta_1=chosen.beta_1,
            beta_2=chosen.beta_2,
            tau=chosen.tau,
        )
        if self.settings.privacy.shared_noise:  # what arrives is the mean step down, with noise
            self.optimizer = ServerOptimizer("adam", beta_2=0.999, tau=1e-12)

    def aggregate(
        self, exchange: RoundMessages, updates: Iterable[Weighted]
    ) -> tuple[AdapterState, Reading]:
        """Return the new global adapter, and how far it is from the mean of updates by weight.

        Raises:
            ValueError: If there is no update, or a weight is not positive.
        """
        rule, chosen = exchange.rule, self.settings.aggregation
        meter = ErrorMeter()
        combine = robust(chosen.robust, chosen.num_malicious_nodes)
        hidden = self.site_privacy
        if hidden is not None:
            updates = hidden.clipped(exchange.current, updates)

        def seen() -> Iterator[Weighted]:
            for update, weight in updates:
                meter.add(exchange.whole(update), weight)
                yield update, weight

        aggregate = rule.aggregate(exchange.current, seen(), combine)
        if hidden is not None:
            aggregate = hidden.noisy(exchange.current, aggregate)
        reading = meter.read(exchange.whole(aggregate), exchange.adapter)
        self._say(reading)
        if self.settings.privacy.shared_noise:
            self.optimizer.learning_rate = self._rate(exchange.current, exchange.round_index)
        stepped = self.optimizer.step(exchange.current, aggregate)
        return {**exchange.adapter, **stepped}, reading

    def _rate(self, current: AdapterState, round_index: int) -> float:
        """Return the learning rate of a round that is one step of the whole training.

        With the bias correction of Adam's moments, which begin at zero (Kingma and Ba 2015,
        https://arxiv.org/abs/1412.6980, Sec. 2).
        """
        settings, train = self.settings, self.settings.train
        peak = train.learning_rate
        if peak is None:
            width = min(value.shape[1] for name, value in current.items() if name.endswith(".A"))
            peak = rate_for_noise(width, settings.federation.num_rounds, settings.adapter)
        adam, step = self.optimizer, round_index + 1
        unbiased = math.sqrt(1 - adam.beta_2**step) / (1 - adam.beta_1**step)
        schedule = scheduler_from(
            torch.optim.SGD([torch.zeros(1)], lr=unbiased * peak),
            StepWindow(round_index, 1, settings.federation.num_rounds),
            lr_scheduler_type=train.lr_scheduler_type,
            warmup_ratio=train.warmup_ratio,
        )
        return float(schedule.get_last_lr()[0])

    def _say(self, reading: Reading) -> None:
        """Say once which rule would have lost less; of hidden sites' updates nothing is said."""
        other = self.settings.aggregation.robust != "none" or self.site_privacy is not None
        better = reading.attainable_error < reading.aggregation_error / 2
        if self._said or other or not better or reading.aggregation_error < NOTABLE_ERROR:
            return
        self._said = True
        logger.warning(
            "the mean of the factors is not the mean of the updates; that is expected, but here "
            "it is %.0f %% off, and --aggregation refactor would be %.2g %% off",
            100 * reading.aggregation_error,
            100 * reading.attainable_error,
        )
