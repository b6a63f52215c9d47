"""A site's side of the protocol: four answers a round, each given once, each after its checks.

What the site must remember between two messages is a `Memory` of plain values, so that it can live
wherever the engine keeps a site's state. The steps follow Bonawitz et al. 2017, Fig. 4
(https://eprint.iacr.org/2017/281), with their first two merged: the channel keys are a run's.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedfora.federated.secure_aggregation.crypto import (
    SEED_BYTES,
    Identity,
    SignedKey,
    add_mask,
    agree,
    is_signed,
    new_private_key,
    new_secret,
    public_key,
    seal,
    split,
    subtract_mask,
    unseal,
    verify,
)
from fedfora.federated.secure_aggregation.fixed_point import Words
from fedfora.federated.secure_aggregation.messages import (
    Delivery,
    Reveal,
    Roster,
    RoundKeys,
    Terms,
    digest_of,
    digest_of_sites,
    mask_context,
    pair_context,
    round_context,
    run_context,
    survivors_context,
)


@dataclass
class OpenRound:
    """What a site keeps from the first answer of a round to the last.

    Args:
        terms: The terms of the round.
        private_key: The key whose shares the neighbors hold.
        seed: The site's own seed, shared likewise.
        present: Who has shared; empty until the vector is masked.
        survivors: The list that the site signed; empty until it has.
        held: For each present neighbor, its seed's share followed by its key's share.
    """

    terms: Terms
    private_key: bytes
    seed: bytes
    present: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()
    held: dict[int, bytes] = field(default_factory=dict)


@dataclass
class Memory:
    """What a site remembers of a run: its key, the others' keys, the open round."""

    run: str = ""
    private_key: bytes = b""
    roster_digest: bytes = b""
    channel_keys: dict[int, bytes] = field(default_factory=dict)
    last_round: int = 0
    open_round: OpenRound | None = None


@dataclass(repr=False)  # the memory holds keys
class SecureSite:
    """One site.

    Args:
        site: Its number, as the other sites know it.
        identity: Its signing key.
        pinned: The public identities of all sites, by number, from provisioning.
        memory: What it remembers; changed in place.
    """

    site: int
    identity: Identity
    pinned: Mapping[int, bytes]
    memory: Memory

    def introduce(self, run: str) -> SignedKey:
        """Make the key of the run and return its public half, signed.

        Asked again, it makes a new key. Rounds that were answered stay answered within the run, so
        nobody gets a second sum of a round with other participants.
        """
        last_round = self.memory.last_round if self.memory.run == run else 0
        private_key = new_private_key()
        fresh = Memory(run=run, private_key=private_key, last_round=last_round)
        self.memory.__dict__.update(fresh.__dict__)
        return self.identity.sign(self.site, public_key(private_key), context=run_context(run))

    def accept_roster(self, roster: Roster) -> None:
        """Check the keys of the run and keep them.

        Raises:
            ValueError: If a key is not signed by the site it names, or this site's own differs.
        """
        own = roster.get(self.site)
        if own is None or own.public != public_key(self._private_key()):
            raise ValueError(f"the roster does not hold the key that site {self.site} made")
        for site, key in roster.items():
            if site not in self.pinned or key.site != site:
                raise ValueError(f"the roster names site {site}, which is not provisioned here")
            verify(key, self.pinned[site], context=run_context(self.memory.run))
        self.memory.roster_digest = digest_of(roster)
        self.memory.channel_keys = {site: key.public for site, key in roster.items()}

    def share(self, terms: Terms) -> RoundKeys:
        """First answer: make this round's key and seed, and share both among the neighbors.

        Raises:
            ValueError: If the terms are not what this site can accept.
        """
        self._check(terms)
        self.memory.last_round = terms.round_number
        opened = OpenRound(terms, new_secret(), new_secret())
        self.memory.open_round = opened
        neighbors = terms.graph[self.site]
        shares = [
            split(secret, threshold=terms.threshold, num_shares=len(neighbors))
            for secret in (opened.seed, opened.private_key)
        ]
        public, context = public_key(opened.private_key), round_context(terms)
        return RoundKeys(
            key=self.identity.sign(self.site, public, context=context),
            seed_digest=hashlib.sha256(opened.seed).digest(),
            sealed={
                neighbor: seal(self._channel(terms, self.site, neighbor), of_seed + of_key)
                for neighbor, of_seed, of_key in zip(neighbors, *shares, strict=True)
            },
        )

    def mask(self, vector: Words, delivery: Delivery, *, task: bytes) -> None:
        """Second answer: hide the vector, in place.

        Args:
            vector: What this site adds to the sum.
            delivery: Who else is there.
            task: A digest of what this site was asked to do, see `mask_context`.

        Raises:
            ValueError: If too few sites are present, or a key or a share is invalid.
        """
        opened = self._open_round()
        if opened.present:
            raise ValueError("this round's vector has already been masked")
        present = self._check_delivery(opened.terms, delivery)
        unsealed = {v: self._unseal(opened.terms, v, delivery.sealed[v]) for v in present}
        received = {v: shares for v, shares in unsealed.items() if shares}
        for neighbor in present:
            key = delivery.keys[neighbor]
            verify(key, self.pinned[neighbor], context=round_context(opened.terms))
            context = mask_context(opened.terms, self.site, neighbor, task, delivery.present)
            seed = agree(opened.private_key, key.public, context=context)
            (add_mask if self.site < neighbor else subtract_mask)(vector, seed)
        add_mask(vector, opened.seed)
        opened.present, opened.held = delivery.present, received

    def confirm(self, survivors: tuple[int, ...]) -> bytes:
        """Third answer: sign the list of survivors; one list a round, so no other can be revealed.

        Survivors are all sites whose vectors are in the sum.

        Raises:
            ValueError: If the sum would be one of too few sites, or another list was signed.
        """
        opened = self._open_round()
        if not opened.present:
            raise ValueError("this site has not sent a vector in the round")
        if self.site not in survivors or not set(survivors) <= set(opened.present):
            raise ValueError("the survivors are not among the sites that were present")
        opened.terms.check_enough(set(survivors), "sent a vector", of=[self.site])
        if opened.survivors not in ((), survivors):
            raise ValueError("this site has signed another list of survivors in the round")
        opened.survivors = survivors
        digest, context = digest_of_sites(survivors), survivors_context(opened.terms)
        return self.identity.sign(self.site, digest, context=context).signature

    def reveal(self, signatures: Mapping[int, bytes]) -> Reveal:
        """Fourth answer: for each neighbor, the share of its seed or of its key, never of both.

        For a survivor it is the seed's, for one whose vector did not arrive the key's. That closes
        the round, so a second request gets nothing.

        Args:
            signatures: Of the survivors under their list, by site.

        Raises:
            ValueError: If too few survivors have signed the list that this site signed.
        """
        opened = self._open_round()
        self._check_signatures(opened, signatures)
        self.memory.open_round = None
        seeds, keys = {}, {}
        for neighbor, shares in opened.held.items():
            if neighbor in opened.survivors:
                seeds[neighbor] = shares[:SEED_BYTES]
            else:
                keys[neighbor] = shares[SEED_BYTES:]
        return Reveal(seeds, keys)

    def _check(self, terms: Terms) -> None:
        if terms.roster_digest != self.memory.roster_digest:
            raise ValueError("the round is based on another roster than the one this site checked")
        if self.site not in terms.participants:
            raise ValueError(f"site {self.site} is asked to share in a round that is not its own")
        if unknown := set(terms.participants) - self.memory.channel_keys.keys():
            raise ValueError(f"sites {sorted(unknown)} take part but are not on the roster")
        if terms.round_number <= self.memory.last_round:
            raise ValueError(
                f"round {terms.round_number} is requested again; this site has answered round "
                f"{self.memory.last_round}"
            )

    def _check_delivery(self, terms: Terms, delivery: Delivery) -> list[int]:
        """Return the neighbors that are present."""
        everybody = set(delivery.present)
        if self.site not in everybody or not everybody <= set(terms.participants):
            raise ValueError("the sites said to be present are not those of the round")
        terms.check_enough(everybody, "shared", of=[self.site])
        present = [v for v in terms.graph[self.site] if v in everybody]
        if not delivery.keys.keys() == delivery.sealed.keys() == set(present):
            raise ValueError("there must be a key and sealed shares from each present neighbor")
        return present

    def _check_signatures(self, opened: OpenRound, signatures: Mapping[int, bytes]) -> None:
        """Count valid signatures; a wrong one does not count, and excludes nobody."""
        if not opened.survivors:
            raise ValueError("this site has signed no list of survivors in the round")
        needed, digest = opened.terms.min_survivors, digest_of_sites(opened.survivors)
        valid = 0
        for site in sorted(set(opened.survivors).intersection(signatures)):
            signed = SignedKey(site, digest, signatures[site])
            valid += is_signed(signed, self.pinned[site], context=survivors_context(opened.terms))
            if valid == needed:
                return
        raise ValueError(
            f"{valid} of {len(opened.terms.participants)} sites signed the list of survivors that "
            f"this site signed; {needed} must: the others may have been told another one"
        )

    def _unseal(self, terms: Terms, sender: int, sealed: bytes) -> bytes:
        """Return a neighbor's two shares; nothing if they are not for this site and this round.

        Then this site holds none, and carries on: a neighbor must not be able to exclude it.
        """
        try:
            shares = unseal(self._channel(terms, sender, self.site), sealed)
        except ValueError:
            return b""
        return shares if len(shares) == 2 * SEED_BYTES else b""

    def _channel(self, terms: Terms, sender: int, receiver: int) -> bytes:
        other = receiver if sender == self.site else sender
        return agree(
            self._private_key(),
            self.memory.channel_keys[other],
            context=pair_context(terms, b"shares", sender, receiver),
        )

    def _private_key(self) -> bytes:
        if not self.memory.private_key:
            raise ValueError(f"site {self.site} has no key for this run: it was restarted")
        return self.memory.private_key

    def _open_round(self) -> OpenRound:
        if self.memory.open_round is None:
            raise ValueError(f"site {self.site} has no open round: it was answered, or never begun")
        return self.memory.open_round
