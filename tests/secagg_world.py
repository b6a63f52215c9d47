"""A federation of sites and a coordinator that only exchange messages, all of them kept."""

from dataclasses import dataclass, field

import numpy as np

from fedfora.federated.secure_aggregation.client import Memory, SecureSite
from fedfora.federated.secure_aggregation.crypto import Identity
from fedfora.federated.secure_aggregation.messages import Terms, digest_of
from fedfora.federated.secure_aggregation.server import SecureRound

RUN, TASK = "run 1", b"task"


@dataclass
class Seen:
    """What a curious coordinator holds of a round: every message."""

    secure_round: SecureRound
    answers: dict = field(default_factory=dict)
    deliveries: dict = field(default_factory=dict)
    masked: dict = field(default_factory=dict)
    survivors: tuple = ()
    signatures: dict = field(default_factory=dict)
    reveals: dict = field(default_factory=dict)
    total: np.ndarray | None = None


def roster_of(keys):
    """The keys of a run by site."""
    return {key.site: key for key in keys}


class World:
    """Sites with pinned identities, and a coordinator."""

    def __init__(self, num_sites, fraction=0.66):
        identities = {u: Identity.generate() for u in range(num_sites)}
        self.pinned = {u: identity.public_bytes for u, identity in identities.items()}
        self.sites = {
            u: SecureSite(u, identity, self.pinned, Memory()) for u, identity in identities.items()
        }
        self.fraction = fraction
        self.roster = roster_of([site.introduce(RUN) for site in self.sites.values()])
        for site in self.sites.values():
            site.accept_roster(self.roster)

    def terms(self, number=1, participants=None):
        chosen = tuple(self.sites) if participants is None else tuple(participants)
        return Terms(number, chosen, self.fraction, digest_of(self.roster))

    def shared(self, terms, size, absent=()):
        """Play the first exchange."""
        seen = Seen(SecureRound(terms, size, TASK))
        for u in terms.participants:
            if u not in absent:
                seen.answers[u] = self.sites[u].share(terms)
                seen.secure_round.receive_keys(u, seen.answers[u])
        seen.deliveries = seen.secure_round.deliveries()
        return seen

    def masked(self, terms, vectors, absent=(), silent=()):
        """Play the first two exchanges; the silent ones mask, but nothing arrives."""
        seen = self.shared(terms, len(next(iter(vectors.values()))), absent)
        for u, delivery in seen.deliveries.items():
            seen.masked[u] = vectors[u].copy()
            self.sites[u].mask(seen.masked[u], delivery, task=TASK)
            if u not in silent:
                seen.secure_round.receive_vector(u, seen.masked[u])
        seen.survivors = seen.secure_round.survivors()
        return seen

    def confirmed(self, terms, vectors, absent=(), silent=(), unsigned=()):
        """Play the first three exchanges; the unsigned ones do not confirm the survivors."""
        seen = self.masked(terms, vectors, absent, silent)
        self.confirm(seen, unsigned)
        return seen

    def confirm(self, seen, unsigned=()):
        """Play the third exchange."""
        for u in set(seen.survivors).difference(unsigned):
            seen.secure_round.receive_signature(u, self.sites[u].confirm(seen.survivors))
        seen.signatures = seen.secure_round.signatures()

    def play(self, terms, vectors, absent=(), silent=(), unsigned=(), mute=()):
        """Play a whole round; the mute ones do not answer the last question."""
        seen = self.confirmed(terms, vectors, absent, silent, unsigned)
        for u in seen.signatures:
            if u not in mute:
                seen.reveals[u] = self.sites[u].reveal(seen.signatures)
                seen.secure_round.receive_reveal(u, seen.reveals[u])
        seen.total = seen.secure_round.total()
        return seen


def random_vectors(sites, size, seed=0):
    rng = np.random.default_rng(seed)
    return {u: rng.integers(0, 2**32, size, dtype=np.uint32) for u in sites}


def plain_sum(vectors, sites):
    """The sum modulo 2^32, in Python's integers."""
    columns = zip(*(vectors[u].tolist() for u in sites), strict=True)
    return np.array([sum(column) % 2**32 for column in columns], dtype=np.uint32)
