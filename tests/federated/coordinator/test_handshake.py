"""Most sites must mean the same base and adapter; who does not is left out, and named."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

import strange_bytes
from fedfora.federated.coordinator.handshake import (
    ASK_AGAIN_ROUNDS,
    Agreement,
    Handshake,
    Membership,
)
from fedfora.federated.embedded import FIRST_NODE_ID, EmbeddedGrid
from fedfora.federated.secure_aggregation.crypto import TAKES_PART, Identity, prompts_digest
from fedfora.federated.wire.transport import Layout, digest_of, pack

LAYOUTS = {name: Layout(((f"{name}.A", (2, 3)),)) for name in ("x", "y")}
DIGESTS = {layout.digest: name for name, layout in LAYOUTS.items()}
PROMPTS = {"template": "plain"}
ESCAPES = "\x1b]0;owned\x07\x1b[2J\n2026-11-28 03:00:00 site s1 is no longer let in" + "!" * 500


def description(index, base, layout, fresh):
    """What an honest site says of itself."""
    return {
        "index": index,
        "name": f"site-{index}",
        "rows": 5,
        "rank": 2,
        "size": 6,
        "data-digest": "",
        "base-fingerprint": base,
        "layout-digest": LAYOUTS[layout].digest,
        "fresh-digest": digest_of(fresh, LAYOUTS[layout]),
        "prompts-digest": prompts_digest(PROMPTS),
    }


def form_of(base, layout, fresh, prompts=PROMPTS, about="1"):
    """What an honest site sends of the fresh adapter, and more than is asked for."""
    described = dict.fromkeys(("name", "quantization", "dtype", "sketch", "more"), about)
    record = {"prompts": prompts, "base_fingerprint": base, "base": described, "more": "more"}
    form = {"layout": LAYOUTS[layout].to_json(), "record": json.dumps(record)}
    return {"fresh": pack(fresh, LAYOUTS[layout]), "form": ConfigRecord(form)}


def numbers(layout, value=1.0):
    return {f"{layout}.A": torch.full((2, 3), value)}


def world(*sites, lies=lambda index, content: content, asked=None):
    """Sites by base and layout; what they say is spoiled by `lies`."""

    def app(message, context):
        index = int(context.node_config["partition-id"])
        base, layout = sites[index]
        content = {"site": ConfigRecord(description(index, base, layout, numbers(layout)))}
        if message.content["ask"]["adapter"]:
            if asked is not None:
                asked.append(index)
            content |= form_of(base, layout, numbers(layout))
        spoiled = lies(index, content)
        return (
            Message(spoiled, reply_to=message)
            if isinstance(spoiled, Error)
            else Message(RecordDict(spoiled), reply_to=message)
        )

    return EmbeddedGrid(app, [{"partition-id": i} for i in range(len(sites))], {})


def agreed(*sites, base=None, **how):
    """Numbers of those who take part, who is left out, and whose adapter it is."""
    absent, asked = {}, []
    grid = world(*sites, asked=asked, **how)
    handshake = Handshake(grid, Membership(), None, absent.__setitem__)
    agreement = handshake.agree(base_fingerprint=base)
    taking_part = [site.index for site in agreement.sites]
    assert agreement.base_fingerprint == sites[asked[-1]][0]
    assert DIGESTS[agreement.layout.digest] == sites[asked[-1]][1]
    assert {float(number) for value in agreement.first.values() for number in value.ravel()} == {1}
    about = dict.fromkeys(("name", "quantization", "dtype", "sketch"), "1")
    fingerprint = agreement.base_fingerprint
    record = {"prompts": PROMPTS, "base_fingerprint": fingerprint, "base": about}
    assert agreement.record == record
    return taking_part, absent, asked[-1]


def only(liar, change):
    """Lies of one site: what it changes in its content."""
    return lambda index, content: change(content) if index == liar else content


def says(**values):
    def change(content):
        told = {name.replace("_", "-"): value for name, value in values.items()}
        kept = {k: v for k, v in {**content["site"], **told}.items() if v is not None}
        return {**content, "site": ConfigRecord(kept)}

    return change


SPOILED = {
    "no description": lambda content: {"x": ConfigRecord({"a": 1})},
    "arrays for a description": lambda content: {"site": content.get("fresh", ArrayRecord())},
    "no fingerprint": says(base_fingerprint=None),
    "no fresh digest": says(fresh_digest=None),
    "a word for a number": says(rows="many"),
    "a negative number": says(rows=-1),
    "an enormous number": says(rank=2**40),
    "yes for a number": says(index=True),
    "a number for a name": says(name=7),
    "a name that a terminal obeys": says(name=ESCAPES),
    "a fingerprint that a terminal obeys": says(base_fingerprint=ESCAPES),
    "an empty fingerprint": says(base_fingerprint=""),
    "a signature that is a word": says(public_key="x", signature="y"),
    "a key of an exabyte": says(public_key=10**18, signature=b"y"),
    "an error that a terminal obeys": lambda content: Error(2, ESCAPES),
}


@pytest.mark.parametrize("lie", SPOILED)
def test_a_site_whose_answer_is_wrong_is_named_in_one_line_and_the_others_begin(lie):
    taking_part, absent, _ = agreed(*[("ours", "x")] * 3, lies=only(0, SPOILED[lie]))
    assert taking_part == [1, 2]
    ((name, reason),) = absent.items()
    assert name.startswith("node ")
    assert reason.isprintable()
    assert 0 < len(reason) <= 200


def test_a_site_that_shows_another_key_than_its_kits_takes_no_part():
    keys = [Identity.generate() for _ in range(3)]

    class Pinned(Membership):
        def identity(self, index):
            return keys[index].public_bytes

    def signed(index, content):
        key = Identity.generate() if index == 1 else keys[index]
        signature = key.sign(index, b"ours", context=TAKES_PART).signature
        return says(public_key=key.public_bytes, signature=signature)(content)

    absent = {}
    grid = world(*[("ours", "x")] * 3, lies=signed)
    sites = Handshake(grid, Pinned(), None, absent.__setitem__).agree().sites
    assert [(site.index, site.identity) for site in sites] == [
        (index, keys[index].public_bytes) for index in (0, 2)
    ]
    (reason,) = absent.values()
    assert "which is not its kit's" in reason


FORMS = {
    "another layout": lambda content: {**content, **form_of("ours", "y", numbers("y"))},
    "other numbers": lambda content: {**content, **form_of("ours", "x", numbers("x", 2.0))},
    "not a number": lambda content: {**content, **form_of("ours", "x", numbers("x", np.nan))},
    "other prompts": lambda content: {
        **content,
        **form_of("ours", "x", numbers("x"), {"template": "another"}),
    },
    "another base": lambda content: {**content, **form_of("theirs", "x", numbers("x"))},
    "a base that a terminal obeys": lambda content: {
        **content,
        **form_of("ours", "x", numbers("x"), about=ESCAPES),
    },
    "nothing": lambda content: {"site": content["site"]},
    "an error": lambda content: Error(2, ESCAPES),
}


def as_numbers(data):
    def change(content):
        array = Array("float32", (6,), "numpy.ndarray", data)
        return {**content, "fresh": ArrayRecord({"numbers": array})}

    return change


FORMS |= {name: as_numbers(data) for name, data in strange_bytes.ALL.items()}


@pytest.mark.parametrize("lie", FORMS)
def test_what_one_site_sends_is_what_most_agreed_on_or_another_one_is_asked(lie):
    """The first site that answered chose layout, first numbers and prompts for all."""

    def spoil(content):
        return FORMS[lie](content) if "form" in content else content

    taking_part, absent, sender = agreed(*[("ours", "x")] * 3, lies=only(0, spoil))
    assert taking_part == [0, 1, 2]
    assert sender == 1
    ((_, reason),) = absent.items()
    assert reason.startswith("its fresh adapter is not used: ")
    assert reason.isprintable()
    assert len(reason) <= 200


def test_a_layout_that_was_not_agreed_on_is_not_used_though_its_numbers_have_the_digest():
    """Where each machine makes other bits, the digest is the sender's own: of whatever it likes."""
    fresh, absent = numbers("y"), {}

    def lie(content):
        told = says(fresh_digest=digest_of(fresh, LAYOUTS["y"]))(content)
        return {**told, **form_of("ours", "y", fresh)} if "form" in content else told

    grid = world(("ours", "x"), ("ours", "x"), lies=only(0, lie))
    handshake = Handshake(grid, Membership(), None, absent.__setitem__)
    with pytest.raises(ValueError, match="no site sent the fresh adapter"):
        handshake.agree(same_bits=False)
    (reason,) = absent.values()
    assert "its layout is not the one that was agreed on" in reason


@pytest.mark.parametrize("digest", ["fresh_digest", "prompts_digest"])
def test_a_site_that_made_another_adapter_than_most_is_not_asked_for_it(digest):
    taking_part, absent, sender = agreed(
        *[("ours", "x")] * 3, lies=only(0, says(**{digest: "0" * 32}))
    )
    assert (taking_part, absent, sender) == ([0, 1, 2], {}, 1)


def test_fresh_adapters_without_a_majority_begin_nothing():
    with pytest.raises(ValueError, match="different fresh adapters") as stopped:
        agreed(*[("ours", "x")] * 2, lies=only(0, says(fresh_digest="0" * 32)))
    assert "site-0" in str(stopped.value)


@pytest.mark.parametrize("odd", range(3))
def test_a_site_with_another_base_is_left_out_and_its_adapter_is_not_used(odd):
    sites = [("ours", "x")] * 3
    sites[odd] = ("another", "x")
    taking_part, absent, sender = agreed(*sites)
    assert taking_part == [i for i in range(3) if i != odd]
    assert absent == {f"site-{odd}": "its base-fingerprint is another, not ours"}
    assert sender != odd


def test_a_site_that_means_another_adapter_is_left_out():
    taking_part, absent, _ = agreed(("ours", "y"), ("ours", "x"), ("ours", "x"))
    assert taking_part == [1, 2]
    assert "layout-digest" in absent["site-0"]


@pytest.mark.parametrize(
    "sites",
    [
        [("a", "x"), ("b", "x")],
        [("a", "x"), ("a", "x"), ("b", "x"), ("b", "x")],
        [("a", "x"), ("b", "x"), ("c", "x")],
        [("a", "x"), ("a", "x"), ("b", "x"), ("c", "x")],
    ],
)
def test_without_a_majority_nobody_is_left_out_and_nothing_begins(sites):
    with pytest.raises(ValueError, match="differ in their base-fingerprint") as stopped:
        agreed(*sites)
    assert all(f"site-{i}" in str(stopped.value) for i in range(len(sites)))


def test_adapters_without_a_majority_are_named_as_what_differs():
    with pytest.raises(ValueError, match="differ in their layout-digest"):
        agreed(("a", "x"), ("a", "y"))


def test_a_run_that_goes_on_keeps_its_base_whatever_most_sites_hold_now():
    sites = [("new", "x"), ("new", "x"), ("old", "x")]
    assert agreed(*sites, base="old")[0] == [2]
    assert agreed(*sites)[0] == [0, 1]


def test_a_run_whose_base_nobody_holds_hears_what_most_hold():
    """Who resumes it then says that it began on another."""
    assert agreed(("new", "x"), ("new", "x"), base="old")[0] == [0, 1]


# Who comes late is asked once, must be who it says it is, and must hold the same base.


LAYOUT = Layout((("x.A", (2, 3)),))
AGREEMENT = Agreement([], "the-base", LAYOUT, {}, {})
KNOWN = {FIRST_NODE_ID}  # the first site takes part from the beginning


class Growing(Membership):
    grows = True

    def objection(self, node_id, index, name):
        return None if node_id == FIRST_NODE_ID + index else "it is somebody else"


@dataclass
class World:
    """Three sites, two of them late; what they answer, and what became of it."""

    answers: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    absent: list = field(default_factory=list)

    def app(self, message, context):
        index = context.node_config["partition-id"]
        self.asked.append(index)
        changed = self.answers.get(index, {})
        if changed is None:
            raise RuntimeError("no base yet")
        site = {
            "index": index,
            "name": f"site-{index}",
            "rows": 5,
            "rank": 2,
            "data-digest": "",
            "base-fingerprint": "the-base",
            "layout-digest": LAYOUT.digest,
            "size": 6,
            "fresh-digest": "0",
            "prompts-digest": "0",
        }
        content = RecordDict({"site": ConfigRecord({**site, **changed})})
        return Message(content, reply_to=message)

    def arrivals(self, members=None):
        grid = EmbeddedGrid(self.app, [{"partition-id": i} for i in range(3)], {})
        members = members or Growing()
        return Handshake(grid, members, None, lambda *told: self.absent.append(told))


def test_those_who_come_late_join():
    world = World()
    joined = world.arrivals().late_joiners(4, KNOWN, AGREEMENT)
    assert [(site.index, site.name) for site in joined] == [(1, "site-1"), (2, "site-2")]
    assert world.asked == [1, 2]


def test_nobody_is_asked_where_the_number_of_sites_is_fixed():
    world = World()
    assert world.arrivals(Membership()).late_joiners(4, KNOWN, AGREEMENT) == []
    assert world.asked == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"base-fingerprint": "another"}, "its base-fingerprint is another, not the-base"),
        ({"layout-digest": "another"}, "its layout-digest is another"),
        ({"index": 0}, "it is somebody else"),
        (None, "no base yet"),
    ],
)
def test_who_may_not_join_is_named_with_the_reason(answer, reason):
    world = World({2: answer})
    assert [site.index for site in world.arrivals().late_joiners(4, KNOWN, AGREEMENT)] == [1]
    ((_, told),) = world.absent
    assert reason in told


def test_who_could_not_join_is_asked_again_only_after_some_rounds():
    world = World({2: None})
    arrivals = world.arrivals()
    arrivals.late_joiners(4, KNOWN, AGREEMENT)
    known = KNOWN | {FIRST_NODE_ID + 1}
    for number in range(5, 4 + ASK_AGAIN_ROUNDS):
        assert arrivals.late_joiners(number, known, AGREEMENT) == []
    assert world.asked == [1, 2]
    world.answers = {}
    joined = arrivals.late_joiners(4 + ASK_AGAIN_ROUNDS, known, AGREEMENT)
    assert [site.index for site in joined] == [2]
