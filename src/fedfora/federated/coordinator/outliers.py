"""What the other updates of a round say of a single one: too long, or pointing elsewhere.

An update's length is judged against the lower median of the lengths so far, so one site among three
or more cannot move the limit at will; its direction, where that is asked for, by the cosine of the
angle to the median, coordinate by coordinate, of the other updates (of those that came first; an
update always resembles itself). Medians are bounded by the honest sites' values while these are
more than half.
"""

import math
from bisect import insort
from collections.abc import Sequence

import torch
from torch import Tensor

from fedfora.federated.aggregation import AdapterState

FEWEST = 4  # updates: of the three others two can outvote one


class UpdateOutliers:
    """The updates of one round.

    Args:
        max_norm_ratio: Longest update as a multiple of the median; infinity for no limit.
        min_median_cosine: Least cosine to the median update; None where directions do not count.
    """

    def __init__(self, max_norm_ratio: float, min_median_cosine: float | None) -> None:
        self.max_norm_ratio, self.min_median_cosine = max_norm_ratio, min_median_cosine
        self._norms: list[float] = []
        self._middles: dict[str, Tensor] | None = None

    @property
    def number(self) -> int:
        """How many were counted."""
        return len(self._norms)

    @property
    def knows_direction(self) -> bool:
        """Whether `learn_direction` had enough updates."""
        return self._middles is not None

    def count(self, norm: float) -> None:
        """Take the length of one more update into account."""
        insort(self._norms, norm)

    def learn_direction(self, changes: Sequence[AdapterState]) -> None:
        """Take these updates for the round's first; once, and if there are enough of them.

        Args:
            changes: What each site changed, with the same names and shapes.
        """
        if not self.knows_direction and len(changes) >= FEWEST:
            self._middles = {
                name: middle_values(torch.stack([change[name] for change in changes]))
                for name in changes[0]
            }

    def cosine(self, change: AdapterState, *, among_the_first: bool) -> float | None:
        """Return the cosine of the angle to the others' median; None where that is not known.

        Args:
            change: What a site changed.
            among_the_first: Whether `learn_direction` was given it.
        """
        if self._middles is None:
            return None
        product = median_square = square = 0.0
        for name, own in change.items():
            middles = self._middles[name]
            median = median_of_others(middles, own) if among_the_first else _median(middles)
            product += _dot(median, own)
            median_square += _dot(median, median)
            square += _dot(own, own)
        lengths = math.sqrt(median_square * square)
        return product / lengths if lengths else 0.0

    def objection(self, norm: float, cosine: float | None) -> str | None:
        """Return why an update is refused, or None."""
        median = self._norms[(len(self._norms) - 1) // 2]
        if 0 < median * self.max_norm_ratio < norm:
            return (
                f"norm: the update's length {norm:.3g} is more than {self.max_norm_ratio:g} times "
                f"the median {median:.3g} (--max_norm_ratio)"
            )
        least = self.min_median_cosine
        if cosine is not None and least is not None and cosine < least:
            return (
                f"direction: the update's cosine to the median of the others is {cosine:.3g}, "
                f"below {least:g} (--min_median_cosine)"
            )
        return None


def middle_values(rows_KN: Tensor) -> Tensor:
    """Return, of each coordinate, the middle two of an even number of values, three of an odd one.

    Of shape `(2 or 3, N...)`, in ascending order; K is at least 3.
    """
    sorted_KN = rows_KN.sort(dim=0).values
    K = len(rows_KN)
    return sorted_KN[(K - 2) // 2 : (K + 3) // 2].clone()


def median_of_others(middles: Tensor, own: Tensor) -> Tensor:
    """Return the median of all values but the own one, from `middle_values` of all.

    Taking one value away moves the middle by half a place: up if the value was below it.
    """
    if len(middles) == 2:
        low, high = middles
        return torch.where(own <= low, high, low)
    low, middle, high = middles
    other = torch.where(own < middle, (middle + high) / 2, (low + middle) / 2)
    return torch.where(own == middle, (low + high) / 2, other)


def _median(middles: Tensor) -> Tensor:
    return middles[1] if len(middles) == 3 else middles.mean(dim=0)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.double().flatten(), other.double().flatten()))
