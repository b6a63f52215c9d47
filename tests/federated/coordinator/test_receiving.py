"""One reply for every message, in order, within the deadline; and the embedded engine's clock."""

import contextlib
import signal
import threading
import time

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict

from fedfora.federated.coordinator.receiving import receive
from fedfora.federated.embedded import EmbeddedGrid


def grid_of(app, sites=4):
    return EmbeddedGrid(app, [{"partition-id": i} for i in range(sites)], {})


def messages(grid, ttl=None):
    return [Message(RecordDict(), node, "train", ttl=ttl) for node in grid.get_node_ids()]


def answer(message, context):
    number = context.node_config["partition-id"]
    return Message(RecordDict({"m": MetricRecord({"n": number})}), reply_to=message)


def told(replies):
    return [
        reply.error.reason if reply.has_error() else reply.content["m"]["n"] for reply in replies
    ]


def test_what_a_site_says_of_an_error_is_one_short_line_that_no_terminal_obeys():
    """It went to the coordinator's terminal, board, record and log as it came."""
    text = "\x1b]0;owned\x07\x1b[2J\n2026-11-28 03:00:00 site s1 is no longer let in" + "!" * 500
    grid = grid_of(lambda message, context: Message(Error(2, text), reply_to=message))
    for reason in told(receive(grid, messages(grid))):
        assert reason.isprintable()
        assert len(reason) <= 200


class Shuffled:
    """A grid whose replies come in another order, some late, some twice, some never."""

    def __init__(self, grid, order, never=()):
        self.grid, self.order, self.never = grid, order, never
        self.ready = None

    def push_messages(self, sent):
        ids = self.grid.push_messages(sent)
        replies = [self.grid.pull_messages([i])[0] for i in ids]
        self.ready = [replies[i] for i in self.order if i not in self.never]
        return ids

    def pull_messages(self, ids):
        return [self.ready.pop(0)] if self.ready else []


def test_replies_come_in_the_order_of_the_messages():
    grid = grid_of(answer)
    shuffled = Shuffled(grid, [2, 0, 3, 1])
    assert told(receive(shuffled, messages(grid))) == [0, 1, 2, 3]


def test_a_reply_that_comes_twice_counts_once():
    grid = grid_of(answer)
    assert told(receive(Shuffled(grid, [1, 1, 0, 2, 1, 3]), messages(grid))) == [0, 1, 2, 3]


def test_after_the_deadline_the_missing_are_answered_for():
    grid = grid_of(answer)
    started = time.monotonic()
    late = Shuffled(grid, [3, 2, 1, 0], never=[1])
    assert told(receive(late, messages(grid), deadline_s=1.0)) == [
        *(0, "no answer within 1 s", 2, 3),
    ]
    assert 1.0 <= time.monotonic() - started < 600


def test_a_site_that_the_engine_does_not_know_is_unreachable():
    grid = grid_of(answer)

    class Forgetful(Shuffled):
        def push_messages(self, sent):
            return super().push_messages(sent)[1:]

    assert told(receive(Forgetful(grid, [1, 2, 3, 0]), messages(grid))) == ["unreachable", 1, 2, 3]


def _sleep():
    time.sleep(3600)


def _spin():
    while True:
        pass


def _swallow_exceptions():
    """As a library does that tries again, whatever happens."""
    while True:
        with contextlib.suppress(Exception):
            time.sleep(3600)


@pytest.mark.parametrize("hang", [_sleep, _spin, _swallow_exceptions])
def test_the_embedded_engine_interrupts_a_site_that_hangs(hang):
    def app(message, context):
        if context.node_config["partition-id"] == 1:
            hang()
        return answer(message, context)

    grid = grid_of(app)
    started = time.monotonic()
    assert told(receive(grid, messages(grid, ttl=1.0))) == [0, "no answer within 1 s", 2, 3]
    assert time.monotonic() - started < 600


def test_each_site_has_the_whole_deadline_though_they_work_in_turn():
    def app(message, context):
        time.sleep(0.6)
        return answer(message, context)

    grid = grid_of(app, sites=6)
    replies = receive(grid, messages(grid, ttl=3.0), deadline_s=3.0)
    assert told(replies) == [0, 1, 2, 3, 4, 5]


def test_outside_the_main_thread_a_late_reply_is_thrown_away():
    def app(message, context):
        if context.node_config["partition-id"] == 0:
            time.sleep(2)
        return answer(message, context)

    grid, answers = grid_of(app, sites=2), []
    thread = threading.Thread(
        target=lambda: answers.extend(told(receive(grid, messages(grid, ttl=1.0))))
    )
    thread.start()
    thread.join()
    assert answers == ["no answer within 1 s", 1]


def test_the_timer_is_gone_afterwards():
    before = signal.getsignal(signal.SIGALRM)
    grid = grid_of(lambda message, context: time.sleep(3600), sites=1)
    told(receive(grid, messages(grid, ttl=0.2)))
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_error_that_flower_made_itself_counts_for_the_site_that_was_asked():
    """Where a message has outlived its time, Flower's error names the coordinator as sender."""

    class Flowers(Shuffled):
        def pull_messages(self, ids):
            replies = super().pull_messages(ids)
            for reply in replies:
                reply.metadata.__dict__["_src_node_id"] = 1
            return replies

    def fail(message, context):
        raise RuntimeError("too late")

    grid = grid_of(fail)
    asked = messages(grid)
    replies = list(receive(Flowers(grid, [0, 1, 2, 3]), asked))
    assert [r.metadata.src_node_id for r in replies] == [m.metadata.dst_node_id for m in asked]
    assert all("too late" in reply.error.reason for reply in replies)
