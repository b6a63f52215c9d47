"""Who shares masks with whom: all with all where they are few, a sparse graph where they are many.

In a sparse graph each site has k neighbors: the sites stand on a circle in an order drawn for the
round, and each is joined to the k / 2 next to it on either side (Bell et al. 2020, Sec. 4,
https://eprint.iacr.org/2020/704). The order comes from a digest that every site computes by itself,
so the coordinator cannot choose a site's neighbors.
"""

import hashlib
from collections.abc import Collection, Sequence
from math import ceil, comb

MIN_SITES = 3  # of two, each knows the other's vector from the sum
FEW = 32  # up to here everybody is everybody's neighbor
COLLUDING = 0.05
DROPPED = 0.1
INSECURE = 2.0**-40
INCOMPLETE = 2.0**-20

Graph = dict[int, tuple[int, ...]]


def draw_graph(sites: Sequence[int], degree: int, seed: bytes) -> Graph:
    """Return each site's neighbors, in ascending order.

    Args:
        sites: The sites of the round.
        degree: k; all others, or an even number.
        seed: What the order on the circle is drawn from.

    Raises:
        ValueError: If no such graph exists.
    """
    count = len(sites)
    if degree == count - 1:
        everybody = sorted(sites)
        return {u: tuple(v for v in everybody if v != u) for u in everybody}
    if degree % 2 or not 2 <= degree < count:
        raise ValueError(f"{count} sites cannot have {degree} neighbors each: an even number below")
    circle = sorted(sites, key=lambda u: hashlib.sha256(seed + u.to_bytes(8, "big")).digest())
    steps = [s for s in range(-degree // 2, degree // 2 + 1) if s]
    return {
        u: tuple(sorted(circle[(place + step) % count] for step in steps))
        for place, u in enumerate(circle)
    }


def is_connected(graph: Graph, kept: Collection[int]) -> bool:
    """Return whether the kept sites still hang together; if not, parts of the sum would show."""
    left = set(kept)
    reached = [left.pop()] if left else []
    while reached:
        new = left.intersection(graph[reached.pop()])
        left -= new
        reached += new
    return not left


def share_threshold(degree: int, fraction: float) -> int:
    """Return how many of `degree` shares bring a secret back; always more than half of them."""
    return max(degree // 2 + 1, ceil(fraction * degree))


def fewest_survivors(num_sites: int, fraction: float) -> int:
    """Return q, how many of a round's n sites must last and sign; a sum of fewer is never opened.

    Two lists with q signatures each have 2 q - n signers in common, and an honest site signs one
    list. So q is more than (n + c) / 2, whatever the fraction: c colluders cannot bring signatures
    for a second list together. c is a share of `COLLUDING`, one site at least.
    """
    colluding = ceil(COLLUDING * num_sites)
    return max(ceil(fraction * num_sites), (num_sites + colluding) // 2 + 1)


def choose_degree(num_sites: int, fraction: float) -> int:
    """Return the fewest neighbors that keep the promises with many sites.

    With t of k shares, a coordinator that has the signatures for one list of survivors only (see
    `fewest_survivors`) can still tell some sites that other neighbors are present. It gets a site's
    seed and the keys of all that it masks with only with 2 t - k colluders among its neighbors. For
    a share of `COLLUDING` sites in its hands that happens anywhere in a round with probability
    below 2^-40. With a share of `DROPPED` sites gone, some site has too few neighbors left with
    probability below 2^-20 (union bounds over hypergeometric tails, as in Bell et al. 2020, Sec.
    4).
    """
    others = num_sites - 1
    if num_sites <= FEW:
        return others
    colluding, dropped = ceil(COLLUDING * others), ceil(DROPPED * others)
    for degree in range(4, others, 2):
        threshold = share_threshold(degree, fraction)
        insecure = num_sites * _tail(others, colluding, degree, 2 * threshold - degree)
        incomplete = num_sites * _tail(others, dropped, degree, degree - threshold + 1)
        if insecure < INSECURE and incomplete < INCOMPLETE:
            return degree
    return others


def _tail(population: int, marked: int, draws: int, least: int) -> float:
    """Return the probability that at least `least` of `draws` are marked, without replacement."""
    ways = sum(
        comb(marked, i) * comb(population - marked, draws - i)
        for i in range(least, min(draws, marked) + 1)
    )
    return ways / comb(population, draws)
