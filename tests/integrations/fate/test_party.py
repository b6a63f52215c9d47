"""A wait for another party ends, and names who is missing and what was heard of it."""

import threading
import time

import pytest

from fedfora.integrations.fate.party import DeadlineFederation, PartyLost

GUEST, HOST, OTHER_HOST, ARBITER = (
    *(("guest", "1"), ("host", "2")),
    *(("host", "3"), ("arbiter", "4")),
)


class Mailbox:
    """FATE's federation as far as a party sees it: a pull that waits for ever."""

    parties = (GUEST, HOST, OTHER_HOST, ARBITER)

    def __init__(self, local_party, letters, changed):
        self.local_party, self.letters, self.changed = local_party, letters, changed

    def push_bytes(self, v, name, tag, parties):
        with self.changed:
            for party in parties:
                self.letters[name, tag, self.local_party, tuple(party)] = v
            self.changed.notify_all()

    def pull_bytes(self, name, tag, parties):
        keys = [(name, tag, tuple(party), self.local_party) for party in parties]
        with self.changed:
            self.changed.wait_for(lambda: all(key in self.letters for key in keys))
            return [self.letters[key] for key in keys]


@pytest.fixture
def federations():
    letters, changed = {}, threading.Condition()

    def make(party, timeout_s=0.2):
        return DeadlineFederation(Mailbox(party, letters, changed), timeout_s=timeout_s)

    return make


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr("fedfora.integrations.fate.party.GRACE_S", 0.2)


def test_messages_arrive_in_the_order_asked_for_and_bytes_are_counted(federations):
    guest, host, other = federations(GUEST), federations(HOST), federations(OTHER_HOST)
    host.push_bytes(b"two", "update", "1", [GUEST])
    other.push_bytes(b"three", "update", "1", [GUEST, ARBITER])
    assert guest.pull_bytes("update", "1", [OTHER_HOST, HOST]) == [b"three", b"two"]
    assert (host.bytes_sent, other.bytes_sent, guest.bytes_sent) == (3, 10, 0)
    assert guest.local_party == GUEST  # everything else is FATE's


def test_a_late_message_is_waited_for(federations):
    guest, host = federations(GUEST, timeout_s=30), federations(HOST)
    timer = threading.Timer(0.1, host.push_bytes, (b"late", "update", "1", [GUEST]))
    timer.start()
    assert guest.pull_bytes("update", "1", [HOST]) == [b"late"]
    timer.join()


def test_only_the_missing_party_is_named(federations):
    guest, host = federations(GUEST), federations(HOST)
    host.push_bytes(b"two", "update", "1", [GUEST])
    started = time.monotonic()
    with pytest.raises(PartyLost) as lost:
        guest.pull_bytes("update", "1", [HOST, OTHER_HOST])
    assert str(lost.value) == "host:3 did not answer within 0.2 s (--timeout_s)"
    assert time.monotonic() - started < 5


def test_who_waits_for_the_one_who_gave_up_learns_whom_that_one_missed(federations):
    arbiter, guest = federations(ARBITER), federations(GUEST)
    with pytest.raises(PartyLost):
        arbiter.pull_bytes("update", "1", [HOST])
    with pytest.raises(PartyLost) as lost:
        guest.pull_bytes("result", "1", [ARBITER])
    assert str(lost.value) == (
        "arbiter:4 did not answer within 0.2 s (--timeout_s); "
        "arbiter:4 ended: host:2 did not answer within 0.2 s (--timeout_s)"
    )


def test_two_that_give_up_together_both_name_the_one_that_is_gone(federations):
    arbiter, guest = federations(ARBITER), federations(GUEST)
    errors = {}

    def wait_for(federation, name, party):
        try:
            federation.pull_bytes(name, "1", [party])
        except PartyLost as lost:
            errors[name] = str(lost)

    threads = [
        threading.Thread(target=wait_for, args=args)
        for args in ((guest, "result", ARBITER), (arbiter, "update", HOST))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors["update"] == "host:2 did not answer within 0.2 s (--timeout_s)"
    assert "arbiter:4 ended: host:2 did not answer" in errors["result"]


def test_a_reason_passes_to_the_others_and_hearsay_does_not(federations):
    host, guest, arbiter = federations(HOST), federations(GUEST), federations(ARBITER)
    host.say_last_word(RuntimeError("disk full"))
    with pytest.raises(PartyLost, match="host:2 ended: disk full") as lost:
        guest.pull_bytes("update", "1", [HOST])
    guest.say_last_word(lost.value)
    with pytest.raises(PartyLost) as lost:
        arbiter.pull_bytes("update", "1", [GUEST])
    assert str(lost.value).count("disk full") == 1


def test_an_error_while_receiving_is_raised_as_it_is(federations):
    guest = federations(GUEST)
    guest._federation.pull_bytes = lambda *_: (_ for _ in ()).throw(OSError("broken pipe"))
    with pytest.raises(OSError, match="broken pipe"):
        guest.pull_bytes("update", "1", [HOST])
