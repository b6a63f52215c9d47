"""Before the first round: who takes part, and does everybody mean the same model?"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedfora.federated.coordinator.membership import Membership
from fedfora.federated.coordinator.receiving import receive
from fedfora.federated.coordinator.strategy import SiteInfo
from fedfora.federated.wire.taking_part import read_part
from fedfora.federated.wire.transport import Layout

SITE_TABLE = "sites.json"  # in the run directory: who has what
OnAbsent = Callable[[str, str], None]


@dataclass(frozen=True)
class Agreement:
    """What the coordinator and the sites agreed on.

    Args:
        sites: Who takes part.
        base_fingerprint: Of everybody's base model.
        layout: Of the adapter that travels.
        first: The fresh adapter.
        adapter_config: Its configuration, as PEFT writes it.
        record: The prompt format, as it is saved beside an adapter.
    """

    sites: list[SiteInfo]
    base_fingerprint: str
    layout: Layout
    first: ArrayRecord
    adapter_config: dict[str, Any]
    record: dict[str, Any]

    def site_table(self) -> list[dict[str, Any]]:
        """Return who has what, for the run's record."""
        return [
            {key: value for key, value in asdict(site).items() if key != "node_id"}
            for site in sorted(self.sites, key=lambda site: site.index)
        ]


def agree(
    grid: Grid,
    *,
    deadline_s: float | None = None,
    on_absent: OnAbsent = lambda site, reason: None,
    members: Membership | None = None,
) -> Agreement:
    """Ask every site what it has, and one of them for the fresh adapter.

    A site that does not answer, or cannot start, takes no part.

    Args:
        grid: The engine.
        deadline_s: Longest time to wait, in seconds; None waits for ever.
        on_absent: Called with a site that takes no part, and the reason.
        members: Who may take part; None for everybody.

    Raises:
        ValueError: If no site can start, or two differ in base model or adapter.
    """
    described: dict[int, ConfigRecord] = {}
    form: RecordDict | None = None
    reasons: list[str] = []

    def absent(site: str, reason: str) -> None:
        reasons.append(reason)
        on_absent(site, reason)

    questions = _questions(sorted(grid.get_node_ids()), deadline_s)
    answers = _answers(grid, questions, deadline_s, absent, members or Membership())
    for node_id, content in answers:
        described[node_id] = content["site"]
        form = form or (content if "form" in content else None)
    if not described:
        raise ValueError(f"no site could start: {'; '.join(dict.fromkeys(reasons)) or 'no sites'}")
    for what in ("base-fingerprint", "layout-digest"):
        if len({site[what] for site in described.values()}) > 1:
            raise ValueError(f"the sites differ in their {what}: {_by_value(described, what)}")
    if form is None:
        form = _form(grid, next(iter(described)), deadline_s)
    return Agreement(
        sites=[_info(node_id, site) for node_id, site in described.items()],
        base_fingerprint=str(next(iter(described.values()))["base-fingerprint"]),
        layout=Layout.from_json(form["form"]["layout"]),
        first=form["fresh"],
        adapter_config=json.loads(form["form"]["adapter-config"]),
        record=json.loads(form["form"]["record"]),
    )


def newcomers(
    grid: Grid,
    node_ids: Iterable[int],
    agreement: Agreement,
    *,
    deadline_s: float | None,
    on_absent: OnAbsent,
    members: Membership,
) -> list[SiteInfo]:
    """Return those nodes that may join a federation that is under way, as the sites they are.

    Args:
        grid: The engine.
        node_ids: Nodes that take no part yet.
        agreement: What they must agree to.
        deadline_s: Longest time to wait, in seconds; None waits for ever.
        on_absent: Called with a site that may not join, or does not answer, and the reason.
        members: Who may take part.
    """
    expected = {
        "base-fingerprint": agreement.base_fingerprint,
        "layout-digest": agreement.layout.digest,
    }
    joined = []
    questions = [_question(node_id, deadline_s, adapter=False) for node_id in node_ids]
    for node_id, content in _answers(grid, questions, deadline_s, on_absent, members):
        site = content["site"]
        differs = [what for what in expected if site[what] != expected[what]]
        if differs:
            reason = f"its {differs[0]} is {site[differs[0]]}, not {expected[differs[0]]}"
            on_absent(str(site["name"]), reason)
        else:
            joined.append(_info(node_id, site))
    return joined


def _answers(
    grid: Grid,
    questions: list[Message],
    deadline_s: float | None,
    on_absent: OnAbsent,
    members: Membership,
) -> Iterator[tuple[int, RecordDict]]:
    """Yield node and content of what comes back from sites that may take part."""
    for reply in receive(grid, questions, deadline_s=deadline_s):
        node_id = reply.metadata.src_node_id
        if reply.has_error():
            on_absent(f"node {node_id}", reply.error.reason)
            continue
        site = reply.content["site"]
        objection = members.objection(node_id, int(site["index"]), str(site["name"]))
        objection = objection or _false_part(site)
        if objection is None:
            yield node_id, reply.content
        else:
            on_absent(f"node {node_id}", objection)


def _questions(node_ids: list[int], ttl: float | None) -> list[Message]:
    """Ask all sites what they have, and the first one for the adapter too."""
    return [_question(node_id, ttl, adapter=node_id == node_ids[0]) for node_id in node_ids]


def _question(node_id: int, ttl: float | None, *, adapter: bool) -> Message:
    content = RecordDict({"ask": ConfigRecord({"adapter": adapter})})
    return Message(content, node_id, MessageType.QUERY, ttl=ttl)


def _form(grid: Grid, node_id: int, deadline_s: float | None) -> RecordDict:
    """Ask another site for the adapter, where the first one did not answer."""
    (reply,) = receive(grid, [_question(node_id, deadline_s, adapter=True)], deadline_s=deadline_s)
    if reply.has_error():
        raise ValueError(f"no site sent the fresh adapter: {reply.error.reason}")
    return reply.content


def _info(node_id: int, site: ConfigRecord) -> SiteInfo:
    return SiteInfo(
        node_id,
        int(site["index"]),
        str(site["name"]),
        int(site["rows"]),
        int(site["rank"]),
        str(site["data-digest"]),
        _key_id(site),
    )


def _key_id(site: ConfigRecord) -> str:
    """Return the id of the key with which a site signed that it takes part; "" where it has none.

    Raises:
        ValueError: If the signature is not that key's.
    """
    if "public-key" not in site:
        return ""
    public, signature = bytes(site["public-key"]), bytes(site["signature"])
    return read_part(public, signature, int(site["index"]), str(site["base-fingerprint"]))


def _false_part(site: ConfigRecord) -> str | None:
    """Return what is wrong with a site's signature; None where nothing is."""
    try:
        _key_id(site)
    except (KeyError, ValueError) as error:
        return str(error)
    return None


def _by_value(described: dict[int, ConfigRecord], what: str) -> str:
    names: dict[str, list[str]] = {}
    for site in described.values():
        names.setdefault(str(site[what]), []).append(str(site["name"]))
    return "; ".join(f"{value}: {', '.join(sites[:5])}" for value, sites in names.items())


def check_same_world(directory: Path, agreement: Agreement, *, may_grow: bool) -> None:
    """Raise unless base model and rows are those of the run that is gone on with.

    Raises:
        ValueError: Naming what changed.
    """
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    if environment["base_fingerprint"] != agreement.base_fingerprint:
        raise ValueError(
            f"--resume {directory}: the run began on base model {environment['base_fingerprint']}, "
            f"this is {agreement.base_fingerprint}"
        )
    table = json.loads((directory / SITE_TABLE).read_text(encoding="utf-8"))
    known = {site["index"]: site for site in table}
    for site in agreement.site_table():
        if may_grow and site["index"] not in known:
            continue
        if known.get(site["index"]) != site:
            raise ValueError(f"--resume {directory}: the rows of {site['name']} have changed")
