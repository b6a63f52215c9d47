"""From rows, sites and a budget to what a private training can be expected to learn.

What decides is nu, the length of the noise on the mean gradient over the clipping norm C, as of one
of 60 steps (of T steps each may have sqrt(T / 60) times as much, since their noise averages out):

    nu = z sqrt(d) / (q N sqrt(K)) sqrt(60 / T)             each of K sites adds noise of its own
    nu = z sqrt(d) sqrt(K / s) / (q N K) sqrt(60 / T)       s sites' shares make the noise whole

with noise multiplier z, d trained parameters, sampling rate q and N rows at a site. A clipped mean
gradient is C long at most, and about C / 2 at first. The bounds below are those of the clinics'
notes on a small base that has learned no task (docs/log.md); a base that has stands more noise.
"""

import math
from dataclasses import dataclass

from fedfora.config import Options, flag
from fedfora.privacy.accounting import Release

# Up to which nu a training gives (nearly all, half or more) of what it gives without privacy.
FROM_SCRATCH, FROM_PUBLIC = (0.7, 1.7), (3.0, 6.0)
WORDS = ("nearly all", "half or more", "next to nothing")


@dataclass
class OutlookArguments(Options):
    """Rows, sites and size of the adapter."""

    rows: int | None = flag(None, "rows of a site", least=1, often=True)
    sites: int = flag(1, "sites that train together, with as many rows each", least=1, often=True)
    trained: int | None = flag(
        None,
        "number of trained parameters; default: those of an adapter on --model_name_or_path",
        least=1,
    )


def noise_to_signal(
    run: Release, *, rows: float, trained: int, sites: int = 1, shares: int = 1
) -> float:
    """Return nu.

    Args:
        run: q, z and T of the whole training.
        rows: N, of a site.
        trained: d.
        sites: K.
        shares: s; 1 where each site adds noise of its own.
    """
    alone = run.noise_multiplier * math.sqrt(trained) / (run.sampling_rate * rows)
    return alone / math.sqrt(sites * shares) * math.sqrt(60 / run.count)


def expectation(nu: float, *, public_start: bool) -> str:
    """Return in words what a training under this much noise learns."""
    most, half = FROM_PUBLIC if public_start else FROM_SCRATCH
    word = WORDS[0] if nu <= most else WORDS[1] if nu <= half else WORDS[2]
    return f"{word} of what a training without privacy learns"


def outlook_line(nu: float, *, public_start: bool) -> str:
    """Return what a run shows before it begins; a warning if it is hopeless."""
    expected = expectation(nu, public_start=public_start)
    line = f"noise is {nu:.2g} times the longest gradient (nu): expect {expected}"
    if not expected.startswith(WORDS[2]):
        return line
    start = "" if public_start else ", --start_adapter with one of public rows"
    return (
        f"WARNING: {line}. Use more rows, sites or budget, a larger --sampling_rate{start}; "
        "see fedfora check privacy"
    )
