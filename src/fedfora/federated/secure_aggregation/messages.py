"""What travels between the sites and the coordinator, as plain values, in the order of a round."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from fedfora.federated.secure_aggregation.crypto import SignedKey
from fedfora.federated.secure_aggregation.graph import (
    MIN_SITES,
    Graph,
    choose_degree,
    draw_graph,
    fewest_survivors,
    share_threshold,
)

Roster = dict[int, SignedKey]


@dataclass(frozen=True)
class Terms:
    """What a round is about; every participant checks them, and what follows from them is fixed.

    Args:
        round_number: From 1; a site takes part in each number once.
        participants: The sites of the round, in ascending order.
        fraction: Of a site's neighbors and of all sites, how many must last until the end.
        roster_digest: Of the keys of the run (see `digest_of`).

    Raises:
        ValueError: If there are too few participants, or the fraction is not in (0.5, 1].
    """

    round_number: int
    participants: tuple[int, ...]
    fraction: float
    roster_digest: bytes

    def __post_init__(self) -> None:
        """Refuse terms under which a vector would not be protected."""
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
        return _degree(len(self.participants), self.fraction)

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
        return _graph(self.participants, self.degree, self.digest)


@dataclass(frozen=True)
class RoundKeys:
    """First exchange, from a site: its key of the round, and sealed shares for its neighbors.

    Args:
        key: Signed for this round.
        seed_digest: SHA-256 of the site's own seed, so that a wrong share is noticed.
        sealed: For each neighbor, the shares of the seed and of the key.
    """

    key: SignedKey
    seed_digest: bytes
    sealed: dict[int, bytes]


@dataclass(frozen=True)
class Delivery:
    """Second exchange, to a site: who is there, and what its neighbors have for it.

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
        terms: What the round is about.
        one: A site.
        other: Another.
        task: A digest of all that decides what a site's vector is, but for its records.
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


@lru_cache(maxsize=16)
def _degree(num_sites: int, fraction: float) -> int:
    return choose_degree(num_sites, fraction)


@lru_cache(maxsize=2)  # all simulated sites of a round ask for the same
def _graph(participants: tuple[int, ...], degree: int, seed: bytes) -> Graph:
    return draw_graph(participants, degree, seed)
