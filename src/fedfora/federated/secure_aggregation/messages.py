"""What travels between the sites and the coordinator, as plain values, in the order of a round."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, comb

from fedfora.federated.secure_aggregation.crypto import SignedKey

Roster = dict[int, SignedKey]


# Who shares masks with whom: all with all if they are few, a sparse graph if they are many.
# In a sparse graph each site has k neighbors: the sites stand on a circle in an order drawn for the
# round, and each is joined to the k / 2 next to it on either side (Bell et al. 2020, Sec. 4,
# https://eprint.iacr.org/2020/704). The order comes from a digest that every site computes by
# itself, so the coordinator cannot choose a site's neighbors.

MIN_SITES = 3  # with two, each would know the other's vector from the sum
FEW = 32  # up to here everybody is everybody's neighbor
COLLUDING = 0.05
DROPPED = 0.1
NUM_CURIOUS_SITES = 1  # if noise is shared: sites that would subtract their own from the sum
INSECURE = 2.0**-40
INCOMPLETE = 2.0**-20

Graph = dict[int, tuple[int, ...]]


@lru_cache(maxsize=2)  # all simulated sites of a round request the same
def draw_graph(sites: tuple[int, ...], degree: int, seed: bytes) -> Graph:
    """Return each site's k neighbors, in ascending order, on a circle that the seed orders.

    Raises:
        ValueError: If no such graph exists: k is neither all others nor an even number below.
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


def is_connected(graph: Graph, members: Collection[int]) -> bool:
    """Return whether the kept sites are still connected; if not, parts of the sum would show."""
    unvisited = set(members)
    reached = [unvisited.pop()] if unvisited else []
    while reached:
        new = unvisited.intersection(graph[reached.pop()])
        unvisited -= new
        reached += new
    return not unvisited


def share_threshold(degree: int, fraction: float) -> int:
    """Return how many of `degree` shares bring a secret back; always more than half of them."""
    return max(degree // 2 + 1, ceil(fraction * degree))


def fewest_survivors(num_sites: int, fraction: float) -> int:
    """Return q, how many of a round's n sites must last and sign; a sum of fewer is never opened.

    Two lists with q signatures each have 2 q - n signers in common, and an honest site signs one
    list. So q is more than (n + c) / 2, whatever the fraction: c colluders cannot collect the
    signatures for a second list. c is a share of `COLLUDING`, at least one site.
    """
    colluding = ceil(COLLUDING * num_sites)
    return max(ceil(fraction * num_sites), (num_sites + colluding) // 2 + 1)


@lru_cache(maxsize=16)
def choose_degree(num_sites: int, fraction: float) -> int:
    """Return the fewest neighbors that keep the promises with many sites.

    With t of k shares, a coordinator that has the signatures for one list of survivors only (see
    `fewest_survivors`) can still tell some sites that other neighbors are present. It gets a site's
    seed and the keys of all that it masks with only with 2 t - k colluders among its neighbors. If
    it controls a share of `COLLUDING` sites, that happens anywhere in a round with probability
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


@dataclass(frozen=True)
class Terms:
    """The terms of a round; every participant checks them, and what follows from them is fixed.

    Args:
        round_number: From 1; a site takes part in each number once.
        participants: The sites of the round, in ascending order.
        fraction: The share of a site's neighbors, and of all sites, that must last to the end.
        roster_digest: Of the keys of the run (see `digest_of`).

    Raises:
        ValueError: If there are too few participants, or the fraction is not in (0.5, 1].
    """

    round_number: int
    participants: tuple[int, ...]
    fraction: float
    roster_digest: bytes

    def __post_init__(self) -> None:
        if len(self.participants) < MIN_SITES:
            raise ValueError(
                f"secure aggregation needs at least {MIN_SITES} sites in a round, got "
                f"{len(self.participants)}: each would know the others' updates from the sum"
            )
        if list(self.participants) != sorted(set(self.participants)):
            raise ValueError("the participants of a round must be different and in order")
        if not 0.5 < self.fraction <= 1:
            raise ValueError(
                f"--secagg_threshold must be above 0.5 and at most 1, got {self.fraction}: with "
                "half of the shares or less, two halves of the sites could be told different "
                "things"
            )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ for every other round, roster, or set of participants."""
        text = json.dumps([self.round_number, self.participants, self.fraction])
        return hashlib.sha256(self.roster_digest + text.encode()).digest()

    @property
    def degree(self) -> int:
        """How many neighbors each site has."""
        return choose_degree(len(self.participants), self.fraction)

    @property
    def threshold(self) -> int:
        """How many of a site's shares bring a secret back."""
        return share_threshold(self.degree, self.fraction)

    @property
    def min_survivors(self) -> int:
        """How many vectors must arrive, and how many sites must sign that they did."""
        return fewest_survivors(len(self.participants), self.fraction)

    @cached_property
    def graph(self) -> Graph:
        """Who is whose neighbor."""
        return draw_graph(self.participants, self.degree, self.digest)

    def check_enough(self, sites: Collection[int], what: str, of: Collection[int]) -> None:
        """Raise unless a sum of some sites' vectors protects each of them.

        Args:
            sites: Those that are left.
            what: What they did.
            of: Sites whose neighbors are counted.

        Raises:
            ValueError: If too few are left, of all or of a site's neighbors, or the graph splits.
        """
        asks = f"--secagg_threshold {self.fraction} asks for"
        if len(sites) < self.min_survivors:
            there = f"{len(sites)} of {len(self.participants)} sites {what}"
            raise ValueError(f"{there}; {asks} {self.min_survivors}")
        for site in of:
            neighbors = len(set(sites).intersection(self.graph[site]))
            if neighbors < self.threshold:
                there = f"{neighbors} of the {self.degree} neighbors of site {site} {what}"
                raise ValueError(f"{there}; {asks} {self.threshold}")
        if not is_connected(self.graph, sites):
            raise ValueError("the sites that are left fall into groups: partial sums would show")


@dataclass(frozen=True)
class RoundKeys:
    """First exchange, from a site: its key of the round, and sealed shares for its neighbors.

    Args:
        seed_digest: SHA-256 of the site's own seed, so that a wrong share is noticed.
        sealed: For each neighbor, the shares of the seed and of the key.
    """

    key: SignedKey
    seed_digest: bytes
    sealed: dict[int, bytes]


@dataclass(frozen=True)
class Delivery:
    """Second exchange, to a site: who is present, and what its neighbors have for it.

    Args:
        present: All sites that have shared, in ascending order.
        keys: The round's keys of those neighbors that are present.
        sealed: What each of them sealed for this site.
    """

    present: tuple[int, ...]
    keys: dict[int, SignedKey]
    sealed: dict[int, bytes]


@dataclass(frozen=True)
class Reveal:
    """Fourth exchange, from a site: one share for each neighbor, of its seed or of its key."""

    seeds: dict[int, bytes]
    keys: dict[int, bytes]


def digest_of(roster: Mapping[int, SignedKey]) -> bytes:
    """Return 32 bytes that differ for every other roster."""
    keys = [[site, roster[site].public.hex()] for site in sorted(roster)]
    return hashlib.sha256(json.dumps(keys).encode()).digest()


def pair_context(terms: Terms, purpose: bytes, first: int, second: int) -> bytes:
    """Return what a secret of two sites is for: purpose, round, and the two in this order."""
    pair = first.to_bytes(8, "big") + second.to_bytes(8, "big")
    return b"\0".join([purpose, terms.digest + pair])


def digest_of_sites(sites: Collection[int]) -> bytes:
    """Return 32 bytes that differ for every other set of sites."""
    return hashlib.sha256(json.dumps(sorted(sites)).encode()).digest()


def mask_context(
    terms: Terms, one: int, other: int, task: bytes, present: Collection[int]
) -> bytes:
    """Return the context of the mask that two sites share; their order does not matter.

    With the present sites in it, the masks of sites that were told different lists do not cancel.
    With the task in it, the masks of sites that were given different tasks do not cancel. Otherwise
    a coordinator could give all sites but one a model that they cannot change, and read that one's
    update from the sum (Pasquini et al. 2022, https://arxiv.org/abs/2111.07380).

    Args:
        terms: The terms of the round.
        one: A site.
        other: Another.
        task: A digest of everything that determines a site's vector, except its records.
        present: The sites that have shared.
    """
    pair = pair_context(terms, b"mask", min(one, other), max(one, other))
    return pair + digest_of_sites(present) + task


def run_context(run: str) -> bytes:
    """Return the context in which a site signs its key of the run."""
    return b"run\0" + run.encode()


def round_context(terms: Terms) -> bytes:
    """Return the context in which a site signs its key of a round."""
    return b"round\0" + terms.digest


def survivors_context(terms: Terms) -> bytes:
    """Return the context in which a site signs the digest of a round's survivors."""
    return b"survivors\0" + terms.digest
