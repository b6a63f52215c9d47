"""What the other updates of a round say of a single one: whether it is too long.

An update's length is judged against the lower median of the lengths so far, so one site among three
or more cannot move the limit at will. The median is bounded by the honest sites' values while these
are more than half.
"""

from bisect import insort


class UpdateOutliers:
    """The updates of one round.

    Args:
        max_norm_ratio: Longest update as a multiple of the median; infinity for no limit.
    """

    def __init__(self, max_norm_ratio: float) -> None:
        self.max_norm_ratio = max_norm_ratio
        self._norms: list[float] = []

    @property
    def number(self) -> int:
        """How many were counted."""
        return len(self._norms)

    def count(self, norm: float) -> None:
        """Take the length of one more update into account."""
        insort(self._norms, norm)

    def objection(self, norm: float) -> str | None:
        """Return why an update is refused, or None."""
        median = self._norms[(len(self._norms) - 1) // 2]
        if 0 < median * self.max_norm_ratio < norm:
            return (
                f"norm: the update's length {norm:.3g} is more than {self.max_norm_ratio:g} times "
                f"the median {median:.3g} (--max_norm_ratio)"
            )
        return None
