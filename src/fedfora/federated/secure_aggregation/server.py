"""The coordinator's side of one round: carries keys and shares, adds up, removes the masks.

It holds one vector, the running sum, however many sites there are. It can remove only the masks
that the sites reveal; with too few of them the round is lost, and says so.
"""

from collections.abc import Callable
from hashlib import sha256
from itertools import combinations

import numpy as np

from fedfora.federated.secure_aggregation.crypto import (
    SEED_BYTES,
    add_mask,
    agree,
    combine,
    public_key,
    subtract_mask,
)
from fedfora.federated.secure_aggregation.fixed_point import Words
from fedfora.federated.secure_aggregation.messages import (
    Delivery,
    Reveal,
    RoundKeys,
    Terms,
    mask_context,
)

MOST_LIARS = 2  # the most sites with wrong shares that are identified in a neighborhood


class RoundLost(ValueError):
    """Too few sites lasted; nobody can learn anything from the round."""


class WrongShares(RoundLost):
    """What a site has shared does not give its secret back, whichever shares are used."""

    def __init__(self, site: int, what: str) -> None:
        super().__init__(f"shares of the {what} of site {site} are wrong")
        self.site = site


class SecureRound:
    """One round, of vectors of `size` words; for the task see `mask_context`."""

    def __init__(self, terms: Terms, size: int, task: bytes) -> None:
        self.terms = terms
        self.task = task
        self._shared: dict[int, RoundKeys] = {}
        self.size = size
        self._sum = np.zeros(size, dtype=np.uint32)
        self._survivors: list[int] = []
        self._signatures: dict[int, bytes] = {}
        self._reveals: dict[int, Reveal] = {}
        self.liars: set[int] = set()

    def receive_keys(self, site: int, answer: RoundKeys) -> None:
        """Take a site's first answer.

        Raises:
            ValueError: If it was not made for this round.
        """
        if answer.key.site != site or set(answer.sealed) != set(self.terms.graph[site]):
            raise ValueError(f"the shares of site {site} are not for its neighbors of this round")
        self._shared[site] = answer

    @property
    def present(self) -> tuple[int, ...]:
        """The sites that have shared."""
        return tuple(sorted(self._shared))

    def deliveries(self) -> dict[int, Delivery]:
        """Close the first exchange and return what each present site is to be told.

        Raises:
            RoundLost: If too few sites have shared.
        """
        self._require("shared", self.present)
        deliveries = {}
        for site in self.present:
            present = [v for v in self.terms.graph[site] if v in self._shared]
            keys = {v: self._shared[v].key for v in present}
            sealed = {v: self._shared[v].sealed[site] for v in present}
            deliveries[site] = Delivery(self.present, keys, sealed)
        return deliveries

    def receive_vector(self, site: int, vector: Words) -> None:
        """Add a masked vector to the sum.

        Raises:
            ValueError: If the site has not shared, has sent one already, or the size is wrong.
        """
        if site not in self._shared or site in self._survivors:
            raise ValueError(f"no vector is expected from site {site}")
        if vector.dtype != np.uint32 or vector.shape != self._sum.shape:
            raise ValueError(
                f"expected {len(self._sum)} words from site {site}, got {vector.dtype} of shape "
                f"{vector.shape}"
            )
        np.add(self._sum, vector, out=self._sum)
        self._survivors.append(site)

    def survivors(self) -> tuple[int, ...]:
        """Close the second exchange and return whose vectors are in the sum.

        Raises:
            RoundLost: If too few vectors arrived.
        """
        survivors = tuple(sorted(self._survivors))
        self._require("sent a vector", survivors)
        return survivors

    def receive_signature(self, site: int, signature: bytes) -> None:
        """Take a site's third answer; the sites check whether it is valid.

        Raises:
            ValueError: If the site's vector is not in the sum.
        """
        if site not in self._survivors:
            raise ValueError(f"no signature is expected from site {site}")
        self._signatures[site] = signature

    def signatures(self) -> dict[int, bytes]:
        """Close the third exchange and return what each site that signed is to be shown.

        Raises:
            RoundLost: If too few sites have signed the list of survivors.
        """
        if len(self._signatures) < self.terms.min_survivors:
            raise RoundLost(
                f"{len(self._signatures)} of {len(self.terms.participants)} sites confirmed whose "
                f"vectors arrived; {self.terms.min_survivors} must"
            )
        return self._signatures

    def receive_reveal(self, site: int, answer: Reveal) -> None:
        """Take a site's fourth answer.

        Raises:
            ValueError: If the site's vector is not in the sum.
        """
        if site not in self._survivors:
            raise ValueError(f"no answer is expected from site {site}")
        self._reveals[site] = answer

    def total(self) -> Words:
        """Remove the masks and return the sum of the survivors' vectors.

        A site that returns wrong shares is identified, because the others' shares fit, and is added
        to `liars`; the sum is right without it.

        Raises:
            RoundLost: If a secret has too few shares.
            WrongShares: If no choice of shares gives a site's secret back.
        """
        survivors = set(self._survivors)
        for site in sorted(survivors):
            digest = self._shared[site].seed_digest
            seed = self._secret(site, "seed", lambda s: sha256(s).digest(), digest)
            subtract_mask(self._sum, seed)
        for site in sorted(self._shared.keys() - survivors):
            neighbors = survivors.intersection(self.terms.graph[site])
            if not neighbors:
                continue
            private = self._secret(site, "key", public_key, self._shared[site].key.public)
            for neighbor in sorted(neighbors):
                context = mask_context(self.terms, site, neighbor, self.task, self.present)
                seed = agree(private, self._shared[neighbor].key.public, context=context)
                (subtract_mask if neighbor < site else add_mask)(self._sum, seed)
        return self._sum

    def _secret(
        self, site: int, what: str, derive: Callable[[bytes], bytes], public: bytes
    ) -> bytes:
        """Return a site's secret from its neighbors' shares; a share's index is the holder's.

        `what` is "seed" or "key". It is right if what derives from it is what the site made public.

        If it is not right, holders are left out, one and then two at a time, until it is. That
        finds who lies as long as at most two do, and fewer than there are shares to spare.
        """
        revealed = {v: r.seeds if what == "seed" else r.keys for v, r in self._reveals.items()}
        shares = {
            index: revealed[neighbor][site]
            for index, neighbor in enumerate(self.terms.graph[site], start=1)
            if neighbor not in self.liars
            and len(revealed.get(neighbor, {}).get(site, b"")) == SEED_BYTES
        }
        spare = len(shares) - self.terms.threshold
        answered = self._reveals.keys() & set(self.terms.graph[site])
        if spare < 0 and len(answered - self.liars) >= self.terms.threshold:
            raise WrongShares(site, what)  # enough have answered, too few of them with a share
        if spare < 0:
            raise RoundLost(
                f"a secret of site {site} cannot be recovered: {self.terms.threshold} shares are "
                f"needed, there are {len(shares)}"
            )
        for count in range(min(spare, MOST_LIARS) + 1):
            for suspects in combinations(sorted(shares), count):
                trusted = {i: share for i, share in shares.items() if i not in suspects}
                secret = combine(trusted, threshold=self.terms.threshold)
                if derive(secret) == public:
                    self.liars |= {self.terms.graph[site][index - 1] for index in suspects}
                    return secret
        if not spare:
            raise RoundLost(f"a share of the {what} of site {site} is wrong; too few to tell whose")
        raise WrongShares(site, what)

    def _require(self, what: str, sites: tuple[int, ...]) -> None:
        """Require what every site will require before it answers."""
        try:
            self.terms.check_enough(sites, what, of=sites)
        except ValueError as error:
            raise RoundLost(str(error)) from error
