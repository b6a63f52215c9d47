"""Who comes late is asked once, must be who it says it is, and must hold the same base."""

from dataclasses import dataclass, field

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedfora.federated.coordinator.arrivals import ASK_AGAIN_ROUNDS, LateJoiners
from fedfora.federated.coordinator.handshake import Agreement
from fedfora.federated.coordinator.membership import Membership
from fedfora.federated.engines.embedded import FIRST_NODE_ID, EmbeddedGrid
from fedfora.federated.wire.transport import Layout

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
