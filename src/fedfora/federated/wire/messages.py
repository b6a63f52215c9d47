"""What goes to a site in a round and comes back: both sides of the wire, for any aggregation rule.

A message brings the factors that travel and, until the site has them, the frozen ones. A site keeps
what it will need again in Flower's `Context.state`: the frozen factors, and what its travel format
lost. All of it is arrays.
"""

from dataclasses import dataclass, field, fields

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedfora.federated.aggregation import RULES, Rule
from fedfora.federated.aggregation.update import AdapterState, absorb, part, truncate
from fedfora.federated.wire.formats import Format
from fedfora.federated.wire.transport import FLOAT32, Layout, digest_of, pack, unpack
from fedfora.training.local import LocalResult

FROZEN, CONFIG = "frozen", "config"


class FrozenFactorsMissingError(RuntimeError):
    """The coordinator assumed that a site has frozen factors, which it does not have (any more)."""


# What a site answers in a round: one adapter, some numbers, and what they answer.
# Both sides use the names in this file, and the coordinator accepts no others.

ARRAYS, METRICS, ORIGIN = "arrays", "metrics", "origin"
RECORDS = {ARRAYS, METRICS, ORIGIN}


@dataclass(frozen=True)
class Origin:
    """What an update starts from; an answer to anything else is useless.

    Args:
        round_number: The round that was asked for, counted from 1.
        base_fingerprint: Of the site's base model.
        layout_digest: Of the names and shapes of the adapter that travels.
    """

    round_number: int
    base_fingerprint: str
    layout_digest: str


@dataclass(frozen=True)
class Report(LocalResult):
    """The numbers of a site's round: those of its training, and of its rows.

    Args:
        rows: Training rows of the site.
        validation_loss: Loss per answer token of the received adapter, before training, on the
            rows that the site holds out; 0 if it holds out none.
        validation_tokens: Answer tokens of those rows.
    """

    rows: int
    validation_loss: float = 0.0
    validation_tokens: int = 0


METRIC_NAMES = {item.name for item in fields(Report)}
VALIDATION_NAMES = {"validation_loss", "validation_tokens"}


@dataclass(frozen=True)
class ExpectedReply:
    """What an honest reply in a round looks like.

    Args:
        origin: What it must start from.
        layout: Names and shapes of the factors that must come.
        example: Arrays with the names, formats, shapes and sizes that must come.
        sent: What the sites trained from.
        form: Travel format of the reply.
    """

    origin: Origin
    layout: Layout
    example: ArrayRecord
    sent: AdapterState
    form: Format = FLOAT32


@dataclass
class RoundMessages:
    """The coordinator's side of one round, counted from 0."""

    rule: Rule
    adapter: AdapterState
    form: Format
    round_index: int
    _outgoing: dict[int, ArrayRecord] = field(default_factory=dict)
    _expected: dict[int, ExpectedReply] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the core into D where the rule does, and name what is frozen."""
        if self.rule.absorbs:
            self.adapter = absorb(self.adapter)
        frozen = part(self.adapter, self.rule.frozen)
        layout = Layout.of(frozen)
        self.frozen = pack(frozen, layout)
        self.digest = digest_of(frozen, layout) if frozen else ""

    @property
    def current(self) -> AdapterState:
        """The factors that the sites' answers replace."""
        return part(self.adapter, self.rule.travels)

    def message(self, rank: int, *, has_frozen: bool) -> RecordDict:
        """Return what a site of a rank receives; it may already have the frozen factors."""
        if rank not in self._outgoing:
            outgoing = self.start(rank)
            self._outgoing[rank] = pack(outgoing, Layout.of(outgoing))
        config = {
            "round-index": self.round_index,
            "rule": self.rule.name,
            "rank": rank,
            "frozen-digest": self.digest,
        }
        content = RecordDict({ARRAYS: self._outgoing[rank], CONFIG: ConfigRecord(config)})
        if self.digest and not has_frozen:
            content[FROZEN] = self.frozen
        return content

    def start(self, rank: int) -> AdapterState:
        """Return what a site of a rank trains from, as far as it sends it back."""
        return truncate(self.current, rank)

    def expected(self, rank: int, origin: Origin) -> ExpectedReply:
        """Return what an honest answer of a site of a rank looks like."""
        if rank not in self._expected:
            start, layout = self.start(rank), Layout.of(self.start(rank))
            example = pack(start, layout, self.form)
            self._expected[rank] = ExpectedReply(origin, layout, example, start, self.form)
        return self._expected[rank]

    def whole(self, update: AdapterState) -> AdapterState:
        """Return a site's whole adapter: what it sent, with the frozen factors."""
        frozen = part(self.adapter, self.rule.frozen)
        return {**frozen, **update}


@dataclass(frozen=True)
class Assignment:
    """The site's side of one round, counted from 0: the adapter that came, with what is frozen."""

    rule: Rule
    round_index: int
    adapter: AdapterState


def read_assignment(content: RecordDict, state: RecordDict, layout: Layout) -> Assignment:
    """Return what a message asks for, and keep the frozen factors it brings in the site's memory.

    Raises:
        ValueError: If the arrays do not fit the adapter.
        FrozenFactorsMissingError: If the site does not have what the coordinator did not send.
    """
    config = content[CONFIG]
    rule = RULES[str(config["rule"])]
    layout = layout.at_rank(int(config["rank"]))
    received = unpack(content[ARRAYS], layout.only(rule.travels))
    frozen = _frozen(content, state, layout.only(rule.frozen), str(config["frozen-digest"]))
    whole = {**received, **frozen}
    return Assignment(rule, int(config["round-index"]), absorb(whole) if rule.absorbs else whole)


def _frozen(content: RecordDict, state: RecordDict, layout: Layout, digest: str) -> AdapterState:
    if not digest:
        return {}
    if FROZEN in content:
        state["frozen"] = content[FROZEN]
    frozen = unpack(state["frozen"], layout) if "frozen" in state else {}
    if not frozen or digest_of(frozen, layout) != digest:
        raise FrozenFactorsMissingError(f"this site does not have the frozen factors {digest}")
    return frozen
