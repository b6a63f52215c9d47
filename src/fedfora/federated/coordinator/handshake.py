"""Before the first round: who takes part, and does everybody mean the same model?

A site may say whatever it likes, so each answer is read strictly: names, types, ranges, lengths. A
site with a wrong answer is named, and takes no part. No single site is believed about what the
others have too: base, adapter and its first numbers are those of more than half of them, and what
one site then sends must have the digest that they agreed on.
"""

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedfora.federated.aggregation.update import AdapterState
from fedfora.federated.coordinator.receiving import receive
from fedfora.federated.secure_aggregation.crypto import prompts_digest, verify_participation
from fedfora.federated.wire.transport import Layout, digest_of, unpack
from fedfora.registry import printable

SITE_TABLE = "sites.json"  # in the run directory: who has what
MUST_MATCH = ("base-fingerprint", "layout-digest")  # of a site's answer: must be everybody's
FACTS = (*MUST_MATCH, "fresh-digest", "prompts-digest")
TEXTS = ("name", "data-digest", *FACTS)
NUMBERS = {"index": 99_999, "rows": 10**12, "rank": 100_000, "size": 10**12}  # and the largest
TABLE = ("index", "name", "rows", "rank", "data_digest", "key_id")  # columns of the site table
OF_ROWS = {"rows", "data_digest"}  # those that no record of hidden sites holds


@dataclass(frozen=True)
class SiteInfo:
    """What a site says about itself.

    Args:
        key_id: Names the key that it signed with; empty if it has none.
        identity: The public key that it must sign with; None if it is not known here.
        facts: Digests of its base, adapter and prompts, under the names of `FACTS`.
        size: How many numbers its adapter has.
    """

    node_id: int
    index: int
    name: str
    rows: int
    rank: int
    data_digest: str
    key_id: str
    identity: bytes | None
    facts: Mapping[str, str]
    size: int


@dataclass(frozen=True)
class Agreement:
    """What the coordinator and the sites agreed on: who takes part, with which base and adapter.

    Args:
        first: The fresh adapter.
        record: Prompt format and base, as they are saved beside an adapter.
    """

    sites: list[SiteInfo]
    base_fingerprint: str
    layout: Layout
    first: AdapterState
    record: dict[str, Any]

    def site_table(self, *, hidden: bool) -> list[dict[str, Any]]:
        """Return who has what, for the run's record; of hidden sites nothing about their rows."""
        sites = sorted(self.sites, key=lambda site: site.index)
        columns = [name for name in TABLE if not (hidden and name in OF_ROWS)]
        return [{name: getattr(site, name) for name in columns} for site in sites]


class Membership:
    """Decides who may take part; this one admits everybody who is there at the start."""

    grows = False  # whether sites may join during the run

    def name_of(self, node_id: int) -> str:
        """Return the name of a node that has not said, or may not say, who it is."""
        return f"node {node_id}"

    def agreed(self, size: int) -> None:
        """Note how many numbers an adapter has; nobody needs to send much more than that."""

    def objection(self, node_id: int, index: int, name: str) -> str | None:
        """Return why a node may not be the site that it claims to be; None if it may."""
        return None

    def identity(self, index: int) -> bytes | None:
        """Return the public key that a site signs with; None if it is not known here."""
        return None


ASK_AGAIN_ROUNDS = 2  # rounds after which a node that could not be admitted is asked again
LATE_DEADLINE_S = 60.0  # the others wait at most this long for a late one, whose base keeps loading


@dataclass
class Handshake:
    """Asks sites who they are and what they have, before the first round and between later ones.

    Args:
        deadline_s: Longest time to wait for an answer, in seconds; None waits forever.
        on_absent: Called with a site that takes no part, and the reason.
    """

    grid: Grid
    members: Membership
    deadline_s: float | None
    on_absent: Callable[[str, str], None]
    _reasons: list[str] = field(default_factory=list)
    _asked_in: dict[int, int] = field(default_factory=dict)

    def agree(self, *, base_fingerprint: str | None = None, same_bits: bool = True) -> Agreement:
        """Ask every site what it has, then one of them for the fresh adapter that most made.

        A site that does not answer, or cannot start, takes no part; nor does one that holds another
        base, or expects another adapter, than more than half of those that answer.

        Args:
            base_fingerprint: Of the base that counts, if a run resumes; None leaves it to the
                sites.
            same_bits: Whether the same seed gives the same fresh adapter on every machine; the last
                bits of a singular value decomposition are the machine's own.

        Raises:
            ValueError: If no site can start, or no more than half agree on base and adapter.
        """
        sites = list(self._answers(sorted(self.grid.get_node_ids()), self.deadline_s))
        if not sites:
            reasons = "; ".join(dict.fromkeys(self._reasons)) or "no sites"
            raise ValueError(f"no site could start: {reasons}")
        sites = self._of_one_mind(sites, base_fingerprint)
        self.members.agreed(sites[0].size)
        layout, first, record = self._form(_senders(sites, same_bits))
        return Agreement(sites, sites[0].facts["base-fingerprint"], layout, first, record)

    def late_joiners(
        self, round_number: int, known: Container[int], agreement: Agreement
    ) -> list[SiteInfo]:
        """Return the sites that arrived, or came back as another node, and join before a round.

        Known nodes take part already; the others must have what was agreed on.
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
        expected = agreement.base_fingerprint, agreement.layout.digest
        deadline_s = min(self.deadline_s or LATE_DEADLINE_S, LATE_DEADLINE_S)
        answers = self._answers(strangers, deadline_s)
        return [site for site in answers if self._agrees(site, expected)]

    def _answers(self, node_ids: list[int], deadline_s: float | None) -> Iterator[SiteInfo]:
        """Yield the sites that answer and may take part."""
        questions = [_question(node_id, deadline_s) for node_id in node_ids]
        for reply in receive(self.grid, questions, deadline_s=deadline_s):
            node_id = reply.metadata.src_node_id
            try:
                site = _read_site(reply, self.members.identity)
                objection = self.members.objection(node_id, site.index, site.name)
            except Exception as error:  # whatever reading their bytes may raise
                objection = str(error) or repr(error)
            if objection is None:
                yield site
            else:
                self._absent(self.members.name_of(node_id), printable(objection))

    def _agrees(self, site: SiteInfo, expected: Iterable[str]) -> bool:
        """Return whether a site's facts that must match are as expected; if not, it is named."""
        for what, value in zip(MUST_MATCH, expected, strict=True):
            if site.facts[what] != value:
                self._absent(site.name, f"its {what} is {site.facts[what]}, not {value}")
                return False
        return True

    def _absent(self, site: str, reason: str) -> None:
        self._reasons.append(reason)
        self.on_absent(site, reason)

    def _of_one_mind(self, sites: list[SiteInfo], base_fingerprint: str | None) -> list[SiteInfo]:
        """Leave out the sites that hold another base, or expect another adapter, than most.

        If a run resumes, its base counts, whatever most sites hold by now.

        Raises:
            ValueError: If there is no such majority.
        """
        facts = [tuple(site.facts[what] for what in MUST_MATCH) for site in sites]
        candidates = [each for each in facts if each[0] == base_fingerprint] or facts
        ((most, count),) = Counter(candidates).most_common(1)
        if 2 * count <= len(candidates):
            what = next(
                name for i, name in enumerate(MUST_MATCH) if len({e[i] for e in candidates}) > 1
            )
            raise ValueError(
                f"the sites differ in their {what}, and no more than half of them agree: "
                f"{_by_value(sites, what)}"
            )
        return [site for site in sites if self._agrees(site, most)]

    def _form(self, senders: Iterable[SiteInfo]) -> tuple[Layout, AdapterState, dict[str, Any]]:
        """Ask one site after the other, until one sends the adapter that they agreed on."""
        for site in senders:
            question = _question(site.node_id, self.deadline_s, adapter=True)
            (reply,) = receive(self.grid, [question], deadline_s=self.deadline_s)
            try:
                return _read_form(reply, site.facts)
            except Exception as error:  # whatever reading their bytes may raise
                reason = printable(f"its fresh adapter is not used: {error}")
                self._absent(self.members.name_of(site.node_id), reason)
        raise ValueError("no site sent the fresh adapter")


def _senders(sites: list[SiteInfo], same_bits: bool) -> list[SiteInfo]:
    """Return those sites that made the fresh adapter, and then the prompts, that most made."""
    for what in ("fresh-digest", "prompts-digest"):
        ((most, count),) = Counter(site.facts[what] for site in sites).most_common(1)
        if what == "fresh-digest" and same_bits and 2 * count <= len(sites):
            raise ValueError(
                "the sites made different fresh adapters of the same seed, and no more than half "
                f"of them the same: {_by_value(sites, what)}"
            )
        sites = [site for site in sites if site.facts[what] == most]
    return sites


def _read_site(reply: Message, identity_of: Callable[[int], bytes | None]) -> SiteInfo:
    """Return what a site says about itself; a signature is checked, if there is one."""
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
    index, key_id = int(site["index"]), ""
    identity = identity_of(index)
    if "public-key" in site:
        public, base = site["public-key"], str(site["base-fingerprint"])
        key_id = verify_participation(public, site.get("signature"), index, base)
        if identity not in (None, public):
            raise ValueError(f"it signs with key {key_id}, which is not its kit's")
    return SiteInfo(
        node_id=reply.metadata.src_node_id,
        index=index,
        name=str(site["name"]),
        rows=int(site["rows"]),
        rank=int(site["rank"]),
        data_digest=str(site["data-digest"]),
        key_id=key_id,
        identity=identity,
        facts={name: str(site[name]) for name in FACTS},
        size=int(site["size"]),
    )


def _question(node_id: int, ttl: float | None, *, adapter: bool = False) -> Message:
    content = RecordDict({"ask": ConfigRecord({"adapter": adapter})})
    return Message(content, node_id, MessageType.QUERY, ttl=ttl)


def _read_form(
    reply: Message, facts: Mapping[str, str]
) -> tuple[Layout, AdapterState, dict[str, Any]]:
    """Return layout, first numbers and record of a site's answer, if they have its digests."""
    if reply.has_error():
        raise ValueError(reply.error.reason)
    form, fresh = reply.content["form"], reply.content["fresh"]
    if not isinstance(fresh, ArrayRecord):
        raise ValueError("it holds no arrays")
    layout = Layout.from_json(str(form["layout"]))
    if layout.digest != facts["layout-digest"]:
        raise ValueError("its layout is not the one that was agreed on")
    first = unpack(fresh, layout)
    if digest_of(first, layout) != facts["fresh-digest"]:
        raise ValueError("its numbers are not those that were agreed on")
    record = json.loads(str(form["record"]))
    if prompts_digest(record["prompts"]) != facts["prompts-digest"]:
        raise ValueError("its prompts are not those that were agreed on")
    if record["base_fingerprint"] != facts["base-fingerprint"]:
        raise ValueError("its base is not the one that was agreed on")
    base = {key: str(record["base"][key]) for key in ("name", "quantization", "dtype", "sketch")}
    if any(text != printable(text, 10_000) for text in base.values()):
        raise ValueError("it describes its base in more than a line of text")
    record = {"prompts": record["prompts"], "base_fingerprint": record["base_fingerprint"]}
    return layout, first, {**record, "base": base}


def _by_value(sites: list[SiteInfo], what: str) -> str:
    names: dict[str, list[str]] = {}
    for site in sites:
        names.setdefault(site.facts[what], []).append(site.name)
    return "; ".join(f"{value}: {', '.join(sites[:5])}" for value, sites in names.items())


def base_of(directory: Path) -> str:
    """Return the fingerprint of the base model that a run began on."""
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    return str(environment["base_fingerprint"])


def check_same_world(
    directory: Path, agreement: Agreement, *, may_grow: bool, hidden: bool
) -> None:
    """Raise unless base model and rows are those of the run to resume.

    Raises:
        ValueError: Naming what has changed.
    """
    if (base := base_of(directory)) != agreement.base_fingerprint:
        raise ValueError(
            f"--resume {directory}: the run began on base model {base}, "
            f"this is {agreement.base_fingerprint}"
        )
    table = json.loads((directory / SITE_TABLE).read_text(encoding="utf-8"))
    known = {site["index"]: site for site in table}
    for site in agreement.site_table(hidden=hidden):
        if may_grow and site["index"] not in known:
            continue
        if not site.items() <= known.get(site["index"], {}).items():
            raise ValueError(f"--resume {directory}: the rows of {site['name']} have changed")
