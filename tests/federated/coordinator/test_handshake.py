"""Most sites must mean the same base and adapter; who does not is left out, and named."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedfora.federated.coordinator.handshake import (
    ASK_AGAIN_ROUNDS,
    Agreement,
    LateJoiners,
    Membership,
    agree,
)
from fedfora.federated.engines.embedded import FIRST_NODE_ID, EmbeddedGrid
from fedfora.federated.wire.transport import Layout

LAYOUTS = {name: Layout(((f"{name}.A", (2, 3)),)) for name in ("x", "y")}
DIGESTS = {layout.digest: name for name, layout in LAYOUTS.items()}


def world(*sites):
    """Sites by base and layout; each sends an adapter of numbers that are its own index."""

    def app(message, context):
        index = int(context.node_config["partition-id"])
        base, layout = sites[index]
        content = RecordDict(
            {
                "site": ConfigRecord(
                    {
                        "index": index,
                        "name": f"site-{index}",
                        "rows": 5,
                        "rank": 2,
                        "data-digest": "",
                        "base-fingerprint": base,
                        "layout-digest": LAYOUTS[layout].digest,
                    }
                )
            }
        )
        if message.content["ask"]["adapter"]:
            content["fresh"] = ArrayRecord({"a": Array(np.full(6, index, np.float32))})
            form = {"layout": LAYOUTS[layout].to_json(), "adapter-config": "{}", "record": "{}"}
            content["form"] = ConfigRecord(form)
        return Message(content, reply_to=message)

    return EmbeddedGrid(app, [{"partition-id": i} for i in range(len(sites))], {})


def agreed(*sites, base=None):
    """Names of those who take part, who is left out, and whose adapter it is."""
    absent = {}
    agreement = agree(world(*sites), on_absent=absent.__setitem__, base_fingerprint=base)
    sender = int(agreement.first["a"].numpy()[0])
    taking_part = [site.index for site in agreement.sites]
    assert agreement.base_fingerprint == sites[sender][0]
    assert DIGESTS[agreement.layout.digest] == sites[sender][1]
    return taking_part, absent, sender


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
AGREEMENT = Agreement([], "the-base", LAYOUT, None, {}, {})
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
        }
        content = RecordDict({"site": ConfigRecord({**site, **changed})})
        return Message(content, reply_to=message)

    def arrivals(self, members=None):
        grid = EmbeddedGrid(self.app, [{"partition-id": i} for i in range(3)], {})
        members = members or Growing()
        return LateJoiners(grid, members, None, lambda *told: self.absent.append(told))


def test_those_who_come_late_join():
    world = World()
    joined = world.arrivals().before(4, KNOWN, AGREEMENT)
    assert [(site.index, site.name) for site in joined] == [(1, "site-1"), (2, "site-2")]
    assert world.asked == [1, 2]


def test_nobody_is_asked_where_the_number_of_sites_is_fixed():
    world = World()
    assert world.arrivals(Membership()).before(4, KNOWN, AGREEMENT) == []
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
    assert [site.index for site in world.arrivals().before(4, KNOWN, AGREEMENT)] == [1]
    ((_, told),) = world.absent
    assert reason in told


def test_who_could_not_join_is_asked_again_only_after_some_rounds():
    world = World({2: None})
    arrivals = world.arrivals()
    arrivals.before(4, KNOWN, AGREEMENT)
    known = KNOWN | {FIRST_NODE_ID + 1}
    for number in range(5, 4 + ASK_AGAIN_ROUNDS):
        assert arrivals.before(number, known, AGREEMENT) == []
    assert world.asked == [1, 2]
    world.answers = {}
    joined = arrivals.before(4 + ASK_AGAIN_ROUNDS, known, AGREEMENT)
    assert [site.index for site in joined] == [2]
