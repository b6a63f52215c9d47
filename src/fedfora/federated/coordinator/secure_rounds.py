"""The coordinator's exchanges under secure aggregation, before and after the training.

A round: `open` asks the drawn sites to share, and returns what their training message must bring;
`take` adds a masked update to the sum; `close` asks the survivors to confirm who they are, then to
reveal, and reads the sum.
Once a run, and whenever a site was restarted, `open` first asks for the sites' keys.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedfora.federated.coordinator.handshake import SiteInfo
from fedfora.federated.coordinator.receiving import receive
from fedfora.federated.secure_aggregation.crypto import SignedKey, verify
from fedfora.federated.secure_aggregation.fixed_point import Summed, Words, read_sum, vector_size
from fedfora.federated.secure_aggregation.messages import (
    Reveal,
    RoundKeys,
    Terms,
    digest_of,
    round_context,
    run_context,
)
from fedfora.federated.secure_aggregation.server import RoundLost, SecureRound, WrongShares
from fedfora.federated.settings import FederationSettings
from fedfora.federated.wire import secure_records as wire
from fedfora.registry import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHOWN = 8


class SecureRounds:
    """Secure aggregation, round after round; sites are known by node and by number.

    Args:
        sites: All sites of the run.
        on_rejected: Called with the node whose answer is not used, and the reason.

    Raises:
        ValueError: If the sum of all sites would not fit into 32 bits.
    """

    def __init__(
        self,
        grid: Grid,
        sites: list[SiteInfo],
        settings: FederationSettings,
        on_rejected: Callable[[int, str], None],
    ) -> None:
        self.grid, self.settings, self.on_rejected = grid, settings, on_rejected
        self.numbers: dict[int, int] = {}  # by node
        self._sites: dict[int, SiteInfo] = {}  # by number
        self.uplink_bytes: Counter[int] = Counter()  # of a round, besides the masked words, by node
        self._keys: dict[int, SignedKey] = {}
        self._informed: set[int] = set()  # nodes that have the newest roster
        for site in sites:
            self.admit(site)
        self._code = settings.fixed_point(len(sites))
        self._round: SecureRound
        self._reasons: list[str] = []
        self._excluded: set[int] = set()  # numbers of sites whose shares were wrong
        self.line: dict[str, float] = {}

    def admit(self, site: SiteInfo) -> None:
        """Admit a site from the next round on; it replaces a node with the same number."""
        self.numbers = {known: n for known, n in self.numbers.items() if n != site.index}
        self.numbers[site.node_id] = site.index
        self._sites[site.index] = site
        self._keys.pop(site.index, None)

    def open(
        self, round_number: int, nodes: list[int], num_numbers: int, task: bytes
    ) -> dict[int, dict[str, ConfigRecord]]:
        """Let the sites of a round share; return what each one that did is told before it trains.

        Args:
            round_number: From 1.
            nodes: The sites drawn for it.
            num_numbers: How many numbers an update has.
            task: A digest of what all sites are asked to do.

        Raises:
            RoundLost: If too few sites share.
            ValueError: If too few sites are drawn, or their sum does not fit into 32 bits.
        """
        self._reasons, self.uplink_bytes = [], Counter()
        asked = nodes if self._keys else self.numbers  # for a key; a new one makes a new roster
        missing = {node: RecordDict() for node in asked if self.numbers[node] not in self._keys}
        self._collect(wire.INTRODUCE, missing, SignedKey, self._take_key)
        candidates = {self.numbers[node] for node in nodes} - self._excluded
        sampled = sorted(candidates.intersection(self._keys))
        fraction = self.settings.secure.secagg_threshold
        terms = Terms(round_number, tuple(sampled), fraction, digest_of(self._keys))
        self._code = self.settings.fixed_point(len(sampled))
        opened = self._round = SecureRound(terms, vector_size(num_numbers), task)
        self._collect(wire.SHARE, self._invitations(terms), RoundKeys, self._take_shares)
        self._informed |= {self._sites[number].node_id for number in opened.present}
        return {
            self._sites[number].node_id: {wire.DELIVERY: wire.write(delivery)}
            for number, delivery in self._or_lost(opened.deliveries).items()
        }

    def take(self, node: int, arrays: ArrayRecord) -> None:
        """Add a site's masked update to the sum.

        Raises:
            ValueError: If it is not what the site was asked for.
        """
        words = wire.read_words(arrays, self._round.size)
        self._round.receive_vector(self.numbers[node], words)

    def close(self) -> Summed:
        """Let the survivors confirm and reveal, and return what the sum says.

        Raises:
            WrongShares: If a site's shares do not give its secret back; it takes no further part.
            RoundLost: If too few sites lasted.
        """
        opened = self._round
        survivors = self._or_lost(opened.survivors)
        question = RecordDict({wire.SURVIVORS: wire.write(survivors)})
        contents = {self._sites[site].node_id: question for site in survivors}
        self._collect(wire.CONFIRM, contents, bytes, opened.receive_signature)
        signatures = self._or_lost(opened.signatures)
        shown = RecordDict({wire.SIGNATURES: wire.write(signatures)})
        contents = {self._sites[site].node_id: shown for site in signatures}
        self._collect(wire.REVEAL, contents, Reveal, opened.receive_reveal)
        summed = self._or_lost(lambda: read_sum(self._total(opened), self._code))
        self.line = {
            "neighbors": opened.terms.degree,
            "threshold": opened.terms.threshold,
            "clipped_numbers": summed.clipped,
            "shortened_updates": summed.shortened,
            "weight": summed.weight,
            "largest_error": self._code.max_error(summed.weight),
        }
        if summed.clipped:
            logger.warning(
                "round %d: numbers of the sites' updates beyond --secagg_range %g, clipped: %d",
                opened.terms.round_number,
                self.settings.secure.secagg_range,
                summed.clipped,
            )
        return summed

    def _total(self, opened: SecureRound) -> Words:
        """Return the sum; sites whose shares were wrong are named, and not asked again."""
        try:
            return opened.total()
        except WrongShares as error:
            self._exclude(error.site, "the shares it handed out are wrong")
            raise
        finally:
            for site in sorted(opened.liars):
                self._exclude(site, "the shares it handed back are wrong")

    def _exclude(self, site: int, reason: str) -> None:
        self._excluded.add(site)
        self._reject(self._sites[site].node_id, f"{reason}: it takes no part in later rounds")

    def _take_key(self, number: int, key: SignedKey) -> None:
        if key.site != number:
            raise ValueError(f"it sent the key of site {key.site}")
        verify(key, self._sites[number].identity, context=run_context(str(self._run)))
        self._keys[number] = key
        self._informed.clear()

    def _take_shares(self, number: int, answer: RoundKeys) -> None:
        context = round_context(self._round.terms)
        verify(answer.key, self._sites[number].identity, context=context)
        self._round.receive_keys(number, answer)

    def _invitations(self, terms: Terms) -> dict[int, RecordDict]:
        contents = {}
        for number in terms.participants:
            node = self._sites[number].node_id
            contents[node] = RecordDict({wire.TERMS: wire.write(terms)})
            if node not in self._informed:
                contents[node][wire.ROSTER] = wire.write(self._keys)
        return contents

    def _collect(
        self,
        what: str,
        contents: dict[int, RecordDict],
        kind: Any,
        take: Callable[[int, Any], None],
    ) -> None:
        """Ask, and pass on each site's answer by the site's number; name what is not used."""
        deadline_s = self.settings.rounds.round_deadline
        messages = [
            Message(content, node, what, ttl=deadline_s) for node, content in contents.items()
        ]
        for reply in receive(self.grid, messages, deadline_s=deadline_s):
            # The run is that of the question; a reply's metadata is the site's own.
            node, self._run = reply.metadata.src_node_id, messages[0].metadata.run_id
            if reply.has_error():
                self._keys.pop(self.numbers[node], None)  # perhaps restarted: asked for a new key
                self._reject(node, reply.error.reason)
                continue
            records = reply.content.config_records.values()
            self.uplink_bytes[node] += sum(len(part.deflate()) for part in records)
            try:
                take(self.numbers[node], wire.read(kind, reply.content[wire.ANSWER]))
            except Exception as error:  # whatever reading their bytes may raise
                self._reject(node, error)

    def _reject(self, node: int, reason: object) -> None:
        told = printable(reason) or type(reason).__name__
        self._reasons.append(f"site {self.numbers[node]}: {told}")
        self.on_rejected(node, f"secure aggregation: {told}")

    def _or_lost(self, step: Callable[[], T]) -> T:
        """Take a step of the round; if too few sites are left for it, say which went and why."""
        try:
            return step()
        except WrongShares:
            raise
        except ValueError as error:
            number = self._round.terms.round_number
            why = "; ".join(["", *self._reasons[:SHOWN]])
            raise RoundLost(f"round {number}: secure aggregation: {error}{why}") from error
