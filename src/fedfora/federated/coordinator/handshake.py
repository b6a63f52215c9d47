"""Before the first round: who takes part, and does everybody mean the same model?

A site may say whatever it likes, so each answer is read strictly: names, types, ranges, lengths. A
site with a wrong answer is named, and takes no part. Nothing is taken on the word of one site where
the others hold it too: base, adapter and its first numbers are those of more than half of them, and
what one site then sends must have the digest that they agreed on.
"""

import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedfora.federated.aggregation.update import AdapterState
from fedfora.federated.coordinator.receiving import UNREADABLE, printable, receive
from fedfora.federated.secure_aggregation.crypto import prompts_digest, verify_participation
from fedfora.federated.wire.transport import Layout, digest_of, unpack

SITE_TABLE = "sites.json"  # in the run directory: who has what
MUST_MATCH = ("base-fingerprint", "layout-digest")  # of a site's answer: must be everybody's
TEXTS = (*MUST_MATCH, "name", "data-digest", "fresh-digest", "prompts-digest")
NUMBERS = {"index": 99_999, "rows": 10**12, "rank": 100_000, "size": 10**12}  # and the largest
OnAbsent = Callable[[str, str], None]


@dataclass(frozen=True)
class SiteInfo:
    """What the coordinator knows of a site; `key_id` names the key it signs with, if it has one."""

    node_id: int
    index: int
    name: str
    rows: int
    rank: int
    data_digest: str = ""
    key_id: str = ""


@dataclass(frozen=True)
class Agreement:
    """What the coordinator and the sites agreed on.

    Args:
        sites: Who takes part.
        base_fingerprint: Of everybody's base model.
        layout: Of the adapter that travels.
        first: The fresh adapter.
        record: Prompt format and base, as they are saved beside an adapter.
    """

    sites: list[SiteInfo]
    base_fingerprint: str
    layout: Layout
    first: AdapterState
    record: dict[str, Any]

    def site_table(self) -> list[dict[str, Any]]:
        """Return who has what, for the run's record."""
        return [
            {key: value for key, value in asdict(site).items() if key != "node_id"}
            for site in sorted(self.sites, key=lambda site: site.index)
        ]


class Membership:
    """Decides who may take part; this one admits everybody who is there at the start.

    Args:
        grows: Whether sites may join while the run is on.
    """

    grows = False

    def name_of(self, node_id: int) -> str:
        """Return what a node is called that has not said, or may not say, who it is."""
        return f"node {node_id}"

    def agreed(self, size: int) -> None:
        """Note how many numbers an adapter has; nobody needs to send much more than that."""

    def objection(self, node_id: int, index: int, name: str) -> str | None:
        """Return why a node may not be the site that it says it is; None where it may."""
        return None


ASK_AGAIN_ROUNDS = 2  # rounds after which a node that could not be taken in is asked again
LATE_DEADLINE_S = 60.0  # the others wait no longer for a late one, whose base keeps loading


@dataclass
class Handshake:
    """Asks sites who they are and what they have, before the first round and between later ones.

    Args:
        grid: The engine.
        members: Who may take part.
        deadline_s: Longest time to wait for an answer, in seconds; None waits for ever.
        on_absent: Called with a site that takes no part, and the reason.
    """

    grid: Grid
    members: Membership
    deadline_s: float | None
    on_absent: OnAbsent
    _reasons: list[str] = field(default_factory=list)
    _asked_in: dict[int, int] = field(default_factory=dict)

    def agree(self, *, base_fingerprint: str | None = None, same_bits: bool = True) -> Agreement:
        """Ask every site what it has, then one of them for the fresh adapter that most made.

        A site that does not answer, or cannot start, takes no part; nor does one that holds another
        base, or means another adapter, than more than half of those that answer.

        Args:
            base_fingerprint: Of the base that counts, where a run resumes; None leaves it to the
                sites.
            same_bits: Whether the same seed gives the same fresh adapter on every machine; the last
                bits of a singular value decomposition are the machine's own.

        Raises:
            ValueError: If no site can start, or no more than half agree on base and adapter.
        """
        described = dict(self._answers(sorted(self.grid.get_node_ids()), self.deadline_s))
        if not described:
            reasons = "; ".join(dict.fromkeys(self._reasons)) or "no sites"
            raise ValueError(f"no site could start: {reasons}")
        described = self._of_one_mind(described, base_fingerprint)
        any_site = next(iter(described.values()))
        self.members.agreed(int(any_site["size"]))
        layout, first, record = self._form(_senders(described, same_bits))
        return Agreement(
            sites=[_info(node_id, site) for node_id, site in described.items()],
            base_fingerprint=str(any_site["base-fingerprint"]),
            layout=layout,
            first=first,
            record=record,
        )

    def late_joiners(
        self, round_number: int, known: Container[int], agreement: Agreement
    ) -> list[SiteInfo]:
        """Return the sites that came, or came back as another node, and join before a round.

        Args:
            round_number: Which.
            known: Nodes that take part already.
            agreement: What a site must agree to.
        """
        if not self.members.grows:
            return []
        since = round_number - ASK_AGAIN_ROUNDS
        strangers = [
            node
            for node in sorted(self.grid.get_node_ids())
            if node not in known and self._asked_in.get(node, since) <= since
        ]
        self._asked_in |= dict.fromkeys(strangers, round_number)
        expected = {
            "base-fingerprint": agreement.base_fingerprint,
            "layout-digest": agreement.layout.digest,
        }
        deadline_s = min(self.deadline_s or LATE_DEADLINE_S, LATE_DEADLINE_S)
        return [
            _info(node_id, site)
            for node_id, site in self._answers(strangers, deadline_s)
            if self._agrees(site, expected)
        ]

    def _answers(
        self, node_ids: list[int], deadline_s: float | None
    ) -> Iterator[tuple[int, ConfigRecord]]:
        """Yield node and description of the sites that answer and may take part."""
        questions = [_question(node_id, deadline_s) for node_id in node_ids]
        for reply in receive(self.grid, questions, deadline_s=deadline_s):
            node_id = reply.metadata.src_node_id
            try:
                site = _description(reply)
                info = _info(node_id, site)
                objection = self.members.objection(node_id, info.index, info.name)
            except UNREADABLE as error:
                objection = str(error)
            if objection is None:
                yield node_id, site
            else:
                self._absent(self.members.name_of(node_id), printable(objection))

    def _agrees(self, site: ConfigRecord, expected: Mapping[str, str]) -> bool:
        """Return whether a site has what is expected of it; if not, it is named."""
        for what, value in expected.items():
            if site[what] != value:
                self._absent(str(site["name"]), f"its {what} is {site[what]}, not {value}")
                return False
        return True

    def _absent(self, site: str, reason: str) -> None:
        self._reasons.append(reason)
        self.on_absent(site, reason)

    def _of_one_mind(
        self, described: dict[int, ConfigRecord], base_fingerprint: str | None
    ) -> dict[int, ConfigRecord]:
        """Leave out the sites that hold another base, or mean another adapter, than most.

        Where a run resumes, its base counts, whatever most sites hold by now.

        Raises:
            ValueError: If there is no such majority.
        """
        facts = [tuple(str(site[what]) for what in MUST_MATCH) for site in described.values()]
        candidates = [each for each in facts if each[0] == base_fingerprint] or facts
        ((most, count),) = Counter(candidates).most_common(1)
        if 2 * count <= len(candidates):
            what = next(
                name for i, name in enumerate(MUST_MATCH) if len({e[i] for e in candidates}) > 1
            )
            raise ValueError(
                f"the sites differ in their {what}, and no more than half of them agree: "
                f"{_by_value(described, what)}"
            )
        expected = dict(zip(MUST_MATCH, most, strict=True))
        return {node: site for node, site in described.items() if self._agrees(site, expected)}

    def _form(
        self, senders: dict[int, ConfigRecord]
    ) -> tuple[Layout, AdapterState, dict[str, Any]]:
        """Ask one site after the other, until one sends the adapter that they agreed on."""
        for node_id, site in senders.items():
            question = _question(node_id, self.deadline_s, adapter=True)
            (reply,) = receive(self.grid, [question], deadline_s=self.deadline_s)
            try:
                return _read_form(reply, site)
            except UNREADABLE as error:
                reason = printable(f"its fresh adapter is not used: {error}")
                self._absent(self.members.name_of(node_id), reason)
        raise ValueError("no site sent the fresh adapter")


def _senders(described: dict[int, ConfigRecord], same_bits: bool) -> dict[int, ConfigRecord]:
    """Return those sites that made the fresh adapter, and then the prompts, that most made."""
    for what in ("fresh-digest", "prompts-digest"):
        ((most, count),) = Counter(str(s[what]) for s in described.values()).most_common(1)
        if what == "fresh-digest" and same_bits and 2 * count <= len(described):
            raise ValueError(
                "the sites made different fresh adapters of the same seed, and no more than half "
                f"of them the same: {_by_value(described, what)}"
            )
        described = {node: site for node, site in described.items() if site[what] == most}
    return described


def _description(reply: Message) -> ConfigRecord:
    """Return what a site says of itself."""
    if reply.has_error():
        raise ValueError(reply.error.reason)
    site = reply.content.get("site")
    if not isinstance(site, ConfigRecord):
        raise ValueError("its answer does not describe a site")
    for name in TEXTS:
        value = site.get(name)
        is_line = isinstance(value, str) and value == printable(value, 100)
        if not is_line or (name in MUST_MATCH and not value):
            raise ValueError(
                f"its {name} is {printable(repr(value), 60)}: not a short line of text"
            )
    for name, most in NUMBERS.items():
        value = site.get(name)
        if type(value) is not int or not 0 <= value <= most:
            shown = printable(repr(value), 60)
            raise ValueError(f"its {name} is {shown}: not a whole number from 0 to {most}")
    return site


def _question(node_id: int, ttl: float | None, *, adapter: bool = False) -> Message:
    content = RecordDict({"ask": ConfigRecord({"adapter": adapter})})
    return Message(content, node_id, MessageType.QUERY, ttl=ttl)


def _read_form(reply: Message, site: ConfigRecord) -> tuple[Layout, AdapterState, dict[str, Any]]:
    """Return layout, first numbers and record of a site's answer, if they have its digests."""
    if reply.has_error():
        raise ValueError(reply.error.reason)
    form, fresh = reply.content["form"], reply.content["fresh"]
    if not isinstance(fresh, ArrayRecord):
        raise ValueError("it holds no arrays")
    layout = Layout.from_json(str(form["layout"]))
    if layout.digest != site["layout-digest"]:
        raise ValueError("its layout is not the one that was agreed on")
    first = unpack(fresh, layout)
    if digest_of(first, layout) != site["fresh-digest"]:
        raise ValueError("its numbers are not those that were agreed on")
    record = json.loads(str(form["record"]))
    if prompts_digest(record["prompts"]) != site["prompts-digest"]:
        raise ValueError("its prompts are not those that were agreed on")
    if record["base_fingerprint"] != site["base-fingerprint"]:
        raise ValueError("its base is not the one that was agreed on")
    base = {key: str(record["base"][key]) for key in ("name", "quantization", "dtype", "sketch")}
    if any(text != printable(text, 10_000) for text in base.values()):
        raise ValueError("it describes its base in more than a line of text")
    record = {"prompts": record["prompts"], "base_fingerprint": record["base_fingerprint"]}
    return layout, first, {**record, "base": base}


def _info(node_id: int, site: ConfigRecord) -> SiteInfo:
    """Return a site as it describes itself, with the id of the key that it signed with, if any."""
    index, key_id = int(site["index"]), ""
    if "public-key" in site:
        public, signature = bytes(site["public-key"]), bytes(site["signature"])
        key_id = verify_participation(public, signature, index, str(site["base-fingerprint"]))
    rows, rank = int(site["rows"]), int(site["rank"])
    digest = str(site["data-digest"])
    return SiteInfo(node_id, index, str(site["name"]), rows, rank, digest, key_id)


def _by_value(described: dict[int, ConfigRecord], what: str) -> str:
    names: dict[str, list[str]] = {}
    for site in described.values():
        names.setdefault(str(site[what]), []).append(str(site["name"]))
    return "; ".join(f"{value}: {', '.join(sites[:5])}" for value, sites in names.items())


def base_of(directory: Path) -> str:
    """Return the fingerprint of the base model that a run began on."""
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    return str(environment["base_fingerprint"])


def check_same_world(directory: Path, agreement: Agreement, *, may_grow: bool) -> None:
    """Raise unless base model and rows are those of the run that is gone on with.

    Raises:
        ValueError: Naming what changed.
    """
    if (base := base_of(directory)) != agreement.base_fingerprint:
        raise ValueError(
            f"--resume {directory}: the run began on base model {base}, "
            f"this is {agreement.base_fingerprint}"
        )
    table = json.loads((directory / SITE_TABLE).read_text(encoding="utf-8"))
    known = {site["index"]: site for site in table}
    for site in agreement.site_table():
        if may_grow and site["index"] not in known:
            continue
        if known.get(site["index"]) != site:
            raise ValueError(f"--resume {directory}: the rows of {site['name']} have changed")
