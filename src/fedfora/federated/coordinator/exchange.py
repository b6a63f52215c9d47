"""A round's exchange with the sites: sampled, asked, screened, and folded into one adapter.

Replies are read one by one as they arrive, in the order of the sites, so every engine adds up the
same numbers in the same order and a rule that needs only sums holds few adapters in memory. Every
reply is screened before the rule sees it.
"""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedfora.federated.aggregation.means import Reading
from fedfora.federated.aggregation.update import AdapterState, Weighted, part
from fedfora.federated.coordinator.aggregator import Aggregator
from fedfora.federated.coordinator.handshake import Agreement, SiteInfo
from fedfora.federated.coordinator.receiving import receive
from fedfora.federated.coordinator.screening import Limits, read_masked, read_validation, screen
from fedfora.federated.coordinator.secure_rounds import SecureRounds
from fedfora.federated.settings import FederationSettings, weight_of
from fedfora.federated.settings_scope import agreed_part
from fedfora.federated.wire.formats import FORMATS
from fedfora.federated.wire.messages import Origin, Report, RoundMessages
from fedfora.federated.wire.secure_records import digest_of_task
from fedfora.federated.wire.transport import Layout, payload_bytes, unflatten
from fedfora.registry import counted, printable
from fedfora.reporting.record import RunRecord
from fedfora.seeds import derive_seed

SHOWN = 8  # refused sites that a message names
SITE_SENT = ("site", "steps", "loss")  # what a watcher sees of a site's answer
# What the record says of a single site that is hidden.
PUBLIC_OF_SITE = {"site", "steps", "uplink_bytes", "downlink_bytes"}


class NoQuorum(ValueError):
    """Too few sites sent a usable update."""


@dataclass(frozen=True)
class Folded:
    """The result of a round's replies.

    Args:
        adapter: The new global adapter, all its factors.
        loss: Mean training loss of the sites, by the tokens they trained on.
        reading: How far the adapter is from the mean update; None if nobody can tell.
        validation_loss: Of the adapter that the sites received; None where they keep no rows back.
    """

    adapter: AdapterState
    loss: float
    reading: Reading | None = None
    validation_loss: float | None = None


class SiteExchange:
    """Trains and asks the sites of a run, round after round; records them as they answer."""

    def __init__(
        self, grid: Grid, aggregator: Aggregator, agreement: Agreement, record: RunRecord
    ) -> None:
        self.grid, self.aggregator, self.record = grid, aggregator, record
        self.settings: FederationSettings = aggregator.settings
        self.agreement = agreement
        self.sites = {
            site.node_id: site for site in sorted(agreement.sites, key=lambda site: site.index)
        }
        self.secure: SecureRounds | None = None
        if self.settings.secure.secure_aggregation:
            self.secure = SecureRounds(grid, agreement.sites, self.settings, self._reject)
        self.used: list[dict[str, Any]] = []  # what each site of the round did, for the record
        self.rejected: list[dict[str, Any]] = []
        self._number = 0
        self._frozen_at: dict[int, str] = {}  # node to the digest of the frozen factors it has
        self._downlink_bytes: dict[int, int] = {}

    def admit(self, site: SiteInfo) -> None:
        """Admit a site from the next round on; it replaces a node with the same number."""
        others = [known for known in self.sites.values() if known.index != site.index]
        ordered = sorted([*others, site], key=lambda known: known.index)
        self.sites = {known.node_id: known for known in ordered}
        if self.secure is not None:
            self.secure.admit(site)

    def sample(self, number: int) -> list[SiteInfo]:
        """Return the sites of a round, by index; the same seed draws the same sites."""
        sites = list(self.sites.values())
        clients_per_round = self.settings.federation.clients_per_round
        if clients_per_round is None:
            return sites
        rng = random.Random(derive_seed(self.settings.train.seed, "sample", number))
        sampled = rng.sample(sites, min(clients_per_round, len(sites)))
        return sorted(sampled, key=lambda site: site.index)

    def train(self, number: int, adapter: AdapterState) -> Folded:
        """Let the sites of a round, counted from 1, train the global adapter; fold what they send.

        Raises:
            NoQuorum: If too few sites sent a usable update, naming the others.
            RoundLost: If too few sites lasted under secure aggregation.
            ValueError: If the aggregate has numbers that are not finite.
        """
        self._number, self.used, self.rejected = number, [], []
        round_messages, sampled = self._messages_of(number, adapter), self.sample(number)
        self.record.announce(
            "round_started",
            round=number,
            num_rounds=self.settings.federation.num_rounds,
            sites=[site.name for site in sampled],
        )
        contents = self._assignments(round_messages, sampled)
        self._downlink_bytes = {
            node: sum(map(payload_bytes, sent.array_records.values()))
            for node, sent in contents.items()
        }
        replies = self._ask(MessageType.TRAIN, contents)
        fold = self._fold if self.secure is None else self._fold_sum
        folded = fold(round_messages, replies, len(sampled))
        if not all(bool(value.isfinite().all()) for value in folded.adapter.values()):
            names = ", ".join(line["site"] for line in self.used[:10])
            raise ValueError(f"round {number}: aggregating the updates of {names} gave NaN or inf")
        return folded

    def validate(self, number: int, adapter: AdapterState) -> float | None:
        """Return an adapter's mean loss on the rows that the sites of a round hold out, if any."""
        self._number = number
        round_messages = self._messages_of(number, adapter)
        contents = {
            site.node_id: round_messages.message(site.rank, has_frozen=False)
            for site in self.sample(number)
        }
        answers = []
        for reply in self._ask(MessageType.EVALUATE, contents):
            try:
                answers.append(read_validation(reply))
            except Exception as error:  # whatever reading their bytes may raise
                self._reject(reply.metadata.src_node_id, f"validation: {printable(error)}")
        return _mean(answers)

    def _messages_of(self, number: int, adapter: AdapterState) -> RoundMessages:
        return RoundMessages(
            self.settings.rule,
            adapter,
            FORMATS[self.settings.aggregation.update_dtype],
            round_index=number - 1,
        )

    def _assignments(
        self, round_messages: RoundMessages, sampled: list[SiteInfo]
    ) -> dict[int, RecordDict]:
        """Return what each site is sent; under secure aggregation, only for those that shared."""
        invited: dict[int, dict[str, ConfigRecord]] = {site.node_id: {} for site in sampled}
        if self.secure is not None:
            rule = round_messages.rule
            received = part(round_messages.adapter, rule.travels + rule.frozen)
            base, settings = self.agreement.base_fingerprint, self.settings.run_config()
            task = digest_of_task(rule.name, base, received, agreed_part(settings))
            size = Layout.of(round_messages.current).size
            invited = self.secure.open(self._number, list(invited), size, task)
        contents = {}
        for site in sampled:
            if site.node_id in invited:
                has_frozen = self._frozen_at.get(site.node_id) == round_messages.digest
                content = round_messages.message(site.rank, has_frozen=has_frozen)
                contents[site.node_id] = RecordDict({**content, **invited[site.node_id]})
        return contents

    def _ask(self, kind: str, contents: dict[int, RecordDict]) -> Iterator[Message]:
        deadline_s = self.settings.rounds.round_deadline
        messages = [
            Message(content, node_id, kind, ttl=deadline_s, group_id=str(self._number))
            for node_id, content in contents.items()
        ]
        return receive(self.grid, messages, deadline_s=deadline_s)

    def _fold(
        self, round_messages: RoundMessages, replies: Iterable[Message], num_sampled: int
    ) -> Folded:
        reports: list[Report] = []
        weighted = self._weighted(round_messages, replies, num_sampled, reports)
        adapter, reading = self.aggregator.aggregate(round_messages, weighted)
        loss = _mean((report.loss, report.answer_tokens) for report in reports)
        assert loss is not None  # there was a quorum
        validation_loss = _mean((r.validation_loss, r.validation_tokens) for r in reports)
        return Folded(adapter, loss, reading, validation_loss)

    def _weighted(
        self,
        round_messages: RoundMessages,
        replies: Iterable[Message],
        num_sampled: int,
        reports: list[Report],
    ) -> Iterator[Weighted]:
        """Yield updates and weights of the replies that pass, and record what the sites did."""
        origin = self._origin()
        named = ((self.sites[reply.metadata.src_node_id], reply) for reply in replies)
        for accepted in screen(
            named,
            lambda site: round_messages.expected(site.rank, origin),
            _limits(self.settings, max(site.rows for site in self.sites.values())),
            lambda site, reason: self._reject(site.node_id, reason),
        ):
            site, report = accepted.sender, accepted.report
            self._frozen_at[site.node_id] = round_messages.digest
            reports.append(report)
            uplink_bytes = payload_bytes(round_messages.expected(site.rank, origin).example)
            self._note(site, uplink_bytes, **vars(report), norm=accepted.norm)
            weight = weight_of(self.settings, report.answer_tokens, report.rows)
            yield accepted.update, float(weight)
        self._check_quorum(num_sampled)

    def _fold_sum(
        self, round_messages: RoundMessages, replies: Iterable[Message], num_sampled: int
    ) -> Folded:
        """Fold the sum of the masked updates; nobody can tell how far off it is."""
        secure, origin = self.secure, self._origin()
        assert secure is not None
        for reply in replies:
            site = self.sites[reply.metadata.src_node_id]
            try:
                masked = read_masked(reply, origin)
                secure.take(site.node_id, masked)
            except Exception as error:  # whatever reading their bytes may raise
                self._reject(site.node_id, printable(error) or type(error).__name__)
                continue
            self._frozen_at[site.node_id] = round_messages.digest
            self._note(site, payload_bytes(masked) + secure.uplink_bytes[site.node_id])
        summed = secure.close()
        self._check_quorum(num_sampled)
        current = round_messages.current
        change = unflatten(summed.mean_N.astype(np.float32), Layout.of(current))
        update = {name: value + change[name] for name, value in current.items()}
        adapter, _ = self.aggregator.aggregate(round_messages, [(update, float(summed.weight))])
        return Folded(adapter, summed.loss)

    def _origin(self) -> Origin:
        agreed = self.agreement
        return Origin(self._number, agreed.base_fingerprint, agreed.layout.digest)

    def _note(self, site: SiteInfo, uplink_bytes: int, **measured: float) -> None:
        """Record what a site did whose update was accepted, as far as that may be told."""
        traveled = {
            "uplink_bytes": uplink_bytes,
            "downlink_bytes": self._downlink_bytes[site.node_id],
        }
        line = public(self.settings, {"site": site.name, **measured, **traveled})
        self.used.append(line)
        self.record.announce("site_sent", **{n: line[n] for n in SITE_SENT if n in line})

    def _reject(self, node_id: int, reason: str) -> None:
        """Record a reply that is left out; the site may have lost the frozen factors."""
        self._frozen_at.pop(node_id, None)
        site = self.sites[node_id].name
        self.rejected.append({"site": site, "reason": reason})
        self.record.log("rejected", round=self._number, site=site, reason=reason)

    def _check_quorum(self, num_sampled: int) -> None:
        """Raise unless enough updates were accepted, naming the sites that are missing, and why."""
        used, needed = len(self.used), self.settings.rounds.min_clients
        if used >= needed:
            return
        have = f"only {used} of {counted(num_sampled, 'site')}" if used else "no site"
        reasons = [f"{entry['site']}: {entry['reason']}" for entry in self.rejected[:SHOWN]]
        more = f"; and {len(self.rejected) - SHOWN} more" if len(self.rejected) > SHOWN else ""
        raise NoQuorum(
            f"round {self._number}: {have} sent a usable update, {needed} needed "
            f"(--min_clients): {'; '.join(reasons)}{more}"
        )


def public(settings: FederationSettings, numbers: dict[str, Any]) -> dict[str, Any]:
    """Leave out what would betray records or sites: losses, and all of a single hidden site.

    Under record privacy sites tell no loss. Of hidden sites the coordinator sees losses, counts
    and lengths, and writes none of them down.
    """
    unit = settings.privacy.privacy_unit
    if unit == "site":
        return {name: value for name, value in numbers.items() if name in PUBLIC_OF_SITE}
    return {name: v for name, v in numbers.items() if name != "loss" or unit == "none"}


def _limits(settings: FederationSettings, most_rows: int) -> Limits:
    """Return what is refused: by default no weight that a site's steps and rows cannot have earned.

    No site has more than `most_rows` rows, as they said before the first round.
    """
    rounds, infinity = settings.rounds, math.inf
    limit, by_rows = rounds.max_weight, settings.aggregation.weighting == "rows"
    most = settings.most_tokens(most_rows)
    # Of hidden sites, a median of the others would let one decide whether another one counts.
    hidden = settings.hides_sites
    return Limits(
        max_tokens=max(limit or 0, most) if by_rows else limit or most,
        max_rows=(limit or most_rows) if by_rows else infinity,
        max_update_norm=rounds.max_update_norm or infinity,
        max_norm_ratio=infinity if hidden else rounds.max_norm_ratio or infinity,
    )


def _mean(answers: Iterable[tuple[float, int]]) -> float | None:
    """Return the mean of losses weighted by tokens; None where there are no tokens."""
    answers = list(answers)
    tokens = sum(each for _, each in answers)
    return sum(loss * each for loss, each in answers) / tokens if tokens else None
