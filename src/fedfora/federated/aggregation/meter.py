"""The error meter: how far an aggregate is from the mean of the updates it stands for.

    error = ||D K A - mean_k(D_k K_k A_k)||_F / ||mean_k(D_k K_k A_k)||_F        over all layers

Differences and norms go through stacked factors and their Gram matrices; no O x I matrix is formed.
Squares are subtracted, so errors below about 1e-7 are rounding.
"""

from dataclasses import dataclass

from fedfora._torch import torch
from fedfora.federated.aggregation.products import ProductMeans, squared_norm
from fedfora.federated.aggregation.update import AdapterState, Product, product
from fedfora.lowrank import best_factors


@dataclass(frozen=True)
class Reading:
    """What the meter shows, under the names of a round's record.

    Args:
        aggregation_error: Of the aggregate, relative to the norm of the mean update; 0 where both
            are zero.
        aggregation_error_of_step: The same difference relative to what the mean changed in this
            round.
        attainable_error: The error of the closest adapter of the same rank: `refactor`'s.
    """

    aggregation_error: float
    aggregation_error_of_step: float
    attainable_error: float


class ErrorMeter(ProductMeans):
    """Sees every update of a round (`add`), and then the aggregate."""

    def read(self, aggregate: AdapterState, before: AdapterState) -> Reading:
        """Compare an aggregate with the mean of what was seen.

        Args:
            aggregate: The new global adapter, all its factors.
            before: The global adapter that the sites started from.
        """
        missed = step = norm = cut = 0.0
        for layer, mean in self.factors().items():
            missed += _squared_distance(product(aggregate, layer), mean)
            step += _squared_distance(product(before, layer), mean)
            norm += squared_norm(mean)
            closest = best_factors(*mean, len(aggregate[f"{layer}.A"]))
            cut += _squared_distance(closest, mean)
        return Reading(_root(missed, norm), _root(missed, step), _root(cut, norm))


def _squared_distance(one: Product, other: Product) -> float:
    left = torch.cat([one[0], -other[0]], dim=1)
    right = torch.cat([one[1], other[1]], dim=0)
    return max(0.0, squared_norm((left, right)))


def _root(numerator: float, denominator: float) -> float:
    return (numerator / denominator) ** 0.5 if denominator > 0 else 0.0
