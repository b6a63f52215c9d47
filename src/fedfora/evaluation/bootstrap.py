"""Numbers of rows to confidence intervals of what their sums give, by resampling the rows."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 2**22  # drawn row numbers held at a time


def resampled_sums(
    counts_NK: NDArray[np.float64], *, seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Return the column sums of `resamples` samples of N rows drawn with replacement.

    Args:
        counts_NK: K numbers for each of N rows.
        seed: Seed of the draws.
        resamples: Number of samples.

    Returns:
        An array of shape `(resamples, K)`.
    """
    rng = np.random.default_rng(seed)
    num_rows = len(counts_NK)
    step = max(1, _CHUNK // num_rows)
    parts = []
    for start in range(0, resamples, step):
        drawn = rng.integers(num_rows, size=(min(step, resamples - start), num_rows))
        times = np.stack([np.bincount(sample, minlength=num_rows) for sample in drawn])
        parts.append(times @ counts_NK)
    return np.concatenate(parts)


def interval(
    sums_BK: NDArray[np.float64], total: Callable[[Sequence[float]], float], level: float = LEVEL
) -> tuple[float, float]:
    """Return the percentile interval of a score (Efron and Tibshirani 1993, Sec. 13.3).

    Args:
        sums_BK: As `resampled_sums` returns them.
        total: Sums of a sample to its score.
        level: Share of the samples' scores inside the interval.
    """
    scores = [total(sums) for sums in sums_BK.tolist()]
    low, high = np.nanpercentile(scores, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
