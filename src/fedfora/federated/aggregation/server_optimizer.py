"""Server optimizers: the aggregate's difference from the global adapter, taken as a gradient.

    Delta_t = aggregate - x_t        x_{t+1} = x_t + eta * step(Delta_t)

Reddi et al. 2021 (https://arxiv.org/abs/2003.00295, Alg. 2) for Adam, Hsu et al. 2019
(https://arxiv.org/abs/1909.06335, Sec. 4) for momentum. SGD at learning rate 1 is the aggregate
itself, to the bit. Moments are held in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fedfora.federated.aggregation.update import AdapterState

NAMES = ("sgd", "momentum", "adam")


@dataclass
class ServerOptimizer:
    """One optimizer with its numbers, under the papers' names, and its moments.

    Args:
        name: Of `NAMES`.
        learning_rate: eta, above 0.
        momentum: Share of the last step that is kept, in [0, 1); only for `momentum`.
        beta_1: Decay of the first moment, in [0, 1).
        beta_2: Decay of the second moment, in [0, 1).
        tau: Degree of adaptivity, above 0; the smaller, the more alike the steps of all numbers.
        moments: All of its state.
    """

    name: str = "sgd"
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    moments: dict[str, Tensor] = field(default_factory=dict)

    def step(self, current: AdapterState, aggregate: AdapterState) -> AdapterState:
        """Return the replacement of `current`, float32, and update the moments."""
        if self.name == "sgd" and self.learning_rate == 1:
            return aggregate
        result = {}
        for name, x in current.items():
            delta = aggregate[name].double() - x.double()
            result[name] = (x.double() + self.learning_rate * self._direction(name, delta)).float()
        return result

    def _direction(self, name: str, delta: Tensor) -> Tensor:
        if self.name == "sgd":
            return delta
        m = self.moments.get(f"m/{name}", delta.new_zeros(delta.shape))
        if self.name == "momentum":
            self.moments[f"m/{name}"] = m = self.momentum * m + delta
            return m
        v = self.moments.get(f"v/{name}", delta.new_full(delta.shape, self.tau**2))
        m = self.beta_1 * m + (1 - self.beta_1) * delta
        v = self.beta_2 * v + (1 - self.beta_2) * delta.square()
        self.moments[f"m/{name}"], self.moments[f"v/{name}"] = m, v
        return m / (v.sqrt() + self.tau)
