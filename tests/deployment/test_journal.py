"""The journal: only ever longer, and whoever changes, cuts or moves a line is found out."""

import json
import math
import os
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.cli.main import main
from fedfora.deployment import journal, site
from fedfora.deployment.gate import MISSING_S, REFUSED_S, GateWatch
from fedfora.deployment.journal import (
    HEAD,
    HOOK,
    JOURNAL,
    RECEIVED,
    SENT,
    alarm,
    append,
    disagreements,
    read_journal,
    shown,
)
from fedfora.deployment.supervisor import LONGEST_PAUSE_S, Child, Supervisor


@pytest.fixture
def state(tmp_path):
    """The state of a kit with a journal of five lines."""
    for number in range(5):
        append(tmp_path / "kit" / "state", SENT, id=f"q{number}", digest=f"a{number}")
    return tmp_path / "kit" / "state"


def changed(state, change):
    """Change the list of lines, and write it back."""
    lines = (state / JOURNAL).read_text().splitlines(keepends=True)
    change(lines)
    (state / JOURNAL).write_text("".join(lines))


def test_lines_follow_each_other_and_only_the_owner_reads_them(state):
    lines = read_journal(state)
    assert [line["number"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(5)]
    assert (state / JOURNAL).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__(2, x[2].replace('"a2"', '"b2"')), "line 3: was changed"),
        (lambda x: x.__setitem__(4, x[4].replace('"a4"', '"b4"')), "line 5: was changed"),
        (lambda x: x.pop(2), "line 3: is numbered 4"),
        (lambda x: x.pop(0), "line 1: is numbered 2"),
        (lambda x: x.pop(), "ends with line 4; lines up to 5 were cut off"),
        (lambda x: x.clear(), "ends with line 0; lines up to 5 were cut off"),
        (lambda x: x.insert(1, x.pop(3)), "line 2: is numbered 4"),
        (lambda x: x.insert(2, x[1]), "line 3: is numbered 2"),
        (lambda x: x.__setitem__(3, x[3][:20]), "line 4: is incomplete"),
        (lambda x: x.append("[]\n"), "line 6"),
    ],
)
def test_a_changed_cut_or_moved_line_is_named(state, change, message):
    changed(state, change)
    with pytest.raises(ValueError, match=message):
        read_journal(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop(), "line 5: is numbered 6"),
        (lambda x: x.clear(), "line 1: is numbered 6"),
        (lambda x: x.__setitem__(4, x[4].replace('"a4"', '"b4"')), "line 5: was changed"),
    ],
)
def test_what_was_done_to_the_end_shows_after_the_next_line_too(state, change, message):
    """The next line wrote a new head, and with it nothing was missed any more."""
    changed(state, change)
    append(state, SENT, id="next")
    with pytest.raises(ValueError, match=message):
        read_journal(state)


def test_no_terminal_obeys_a_line_whose_run_the_other_side_has_named(state):
    line = append(state, SENT, id="q", run="\x1b]0;owned\x07\x1b[2J\n     7  forged")
    assert shown(line).isprintable()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 4), st.integers(0, 10_000), st.integers(1, 255))
def test_no_bit_of_a_line_can_be_changed(tmp_path_factory, number, at, flip):
    state = tmp_path_factory.mktemp("bits")
    for each in range(5):
        append(state, SENT, id=f"q{each}")
    texts = (state / JOURNAL).read_bytes().splitlines(keepends=True)
    line = bytearray(texts[number])
    line[at % len(line)] ^= flip
    texts[number] = bytes(line)
    (state / JOURNAL).write_bytes(b"".join(texts))
    with pytest.raises(ValueError, match="journal"):
        read_journal(state)


def test_a_missing_head_is_named(state):
    (state / HEAD).unlink()
    with pytest.raises(ValueError, match=r"journal\.head: is missing"):
        read_journal(state)


def test_half_a_line_of_a_writer_that_was_killed_is_no_line(state):
    with (state / JOURNAL).open("a") as file:
        file.write('{"number": 6, "ti')
    append(state, SENT, id="q5")
    assert [line["id"] for line in read_journal(state)][-2:] == ["q4", "q5"]


def test_a_writer_that_was_killed_before_the_head_is_no_tampering(state):
    before = (state / HEAD).read_text()
    append(state, SENT, id="q5")
    (state / HEAD).write_text(before)
    assert len(read_journal(state)) == 6


def test_a_full_disk_leaves_the_journal_as_it_was(state, monkeypatch):
    monkeypatch.setattr(journal.os, "fsync", no_space)
    before = (state / JOURNAL).read_bytes()
    with pytest.raises(OSError, match="No space"):
        append(state, SENT, id="q5")
    assert (state / JOURNAL).read_bytes() == before


def test_many_writers_make_one_chain(tmp_path):
    threads = [
        threading.Thread(target=lambda: [append(tmp_path, "x") for _ in range(20)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_journal(tmp_path)) == 160


def test_a_line_longer_than_what_is_read_at_a_time_is_followed_too(tmp_path):
    for _ in range(3):
        append(tmp_path, "x", text="y" * 300_000)
    assert len(read_journal(tmp_path)) == 3


def answers(event, *pairs, site="north"):
    return [
        {"number": i, "event": event, "site": site, "id": id, "digest": digest}
        for i, (id, digest) in enumerate(pairs, 2)
    ]


def test_an_answer_in_a_sites_name_that_it_did_not_send_shows_in_the_comparison():
    own = [{"number": 1, "event": "started", "site": "north"}]
    own += answers(SENT, ("q1", "a"), ("q2", "b"), ("late", "c"))
    honest = answers(RECEIVED, ("q2", "b"), ("q1", "a"))
    others = answers(RECEIVED, ("q9", "z"), site="south")
    assert disagreements([*honest, *others], own) == []
    with pytest.raises(ValueError, match="does not say whose it is"):
        disagreements(honest, own[1:])
    forged = answers(RECEIVED, ("q3", "x"), ("q2", "y"))
    assert disagreements(forged, own) == [
        "line 2: north has not sent the answer to q3",
        "line 3: north sent a different answer to q2",
    ]


def test_only_the_error_of_a_full_disk_may_be_missing_at_the_site():
    own = [{"number": 1, "event": "started", "site": "north"}]
    received = {"number": 7, "event": RECEIVED, "site": "north", "id": "q"}
    assert disagreements([{**received, "error": "site-error DISK 1a2b3c"}], own) == []
    for facts in ({"error": "site-error TRAIN 1a2b3c"}, {"digest": "x"}):
        found = disagreements([{**received, **facts}], own)
        assert found == ["line 7: north has not sent the answer to q"]


def test_an_alarm_starts_the_kits_own_program_with_the_line(state):
    hook = state.parent / HOOK
    hook.write_text('#!/bin/sh\ncd "$(dirname "$0")"\ncat > "$1.json"\necho > state/done\n')
    hook.chmod(0o700)
    os.mkfifo(state / "done")
    alarm(state, "missing", site="north")
    (state / "done").read_text()  # waits for the program
    told = json.loads((state.parent / "missing.json").read_text())
    assert told == read_journal(state)[-1]
    assert (told["event"], told["alarm"], told["site"]) == ("missing", True, "north")


def test_an_alarm_without_a_program_or_a_disk_does_no_harm(state, monkeypatch):
    alarm(state, "missing")
    (state.parent / HOOK).write_text("not a program")
    (state.parent / HOOK).chmod(0o700)
    monkeypatch.setattr(journal.os, "fsync", no_space)
    alarm(state, "missing")


def test_a_supernode_that_never_lasts_is_an_alarm_once(tmp_path):
    """It is turned away again and again; a first failure is none."""
    for pause_s, alarms in ((1.0, []), (LONGEST_PAUSE_S, ["not_let_in"])):
        looks, said = iter([False] * 3), []
        supernode = Child("SuperNode", list, tmp_path / "log", pause_s=pause_s, due=math.inf)
        over = SimpleNamespace(wait=lambda seconds, looks=looks: next(looks, True))
        site._keep_running(Supervisor([supernode], said.append), tmp_path / "state", over)
        assert [line.split(":")[0] for line in said] == [f"ALARM {event}" for event in alarms]
    assert [(line["event"], line["alarm"]) for line in read_journal(tmp_path / "state")] == [
        ("not_let_in", True)
    ]


def no_space(descriptor):
    raise OSError(28, "No space left on device")


class Log:
    """A gate's log, and who looks at it."""

    def __init__(self, path, addresses=()):
        self.path = path
        path.touch()
        self.watch = GateWatch(path, dict(addresses))
        self.now = 0.0

    def line(self, path, status="200", site="north", address="10.0.0.1", certificate="SUCCESS"):
        line = {"path": f"/v1/fleet/{path}", "status": status, "address": address}
        line |= {"site": f"CN={site}", "certificate": certificate}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def found(self, *sites, after=0.0):
        self.now += after
        return list(self.watch.look(sites, self.now))

    def alarms(self, *sites, after=0.0):
        return [(event, facts) for event, loud, facts in self.found(*sites, after=after) if loud]


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "gate.log")


def test_a_site_that_comes_for_the_first_time_is_written_down_without_alarm(log):
    log.line("activate-node", "412")  # its key is not registered yet
    log.line("activate-node")
    log.line("pull-messages")
    (line,) = log.found("north")
    assert line == ("address", False, {"site": "north", "address": "10.0.0.1", "before": None})
    assert log.found("north") == []


def test_a_second_holder_of_a_kit_is_an_alarm_from_whatever_address(log):
    log.line("activate-node")
    log.found("north")
    log.line("activate-node", "412")
    assert log.alarms("north") == []  # perhaps the site itself, which was killed
    log.line("pull-messages")
    assert [event for event, _ in log.alarms("north")] == ["second_holder"]


def test_a_stolen_kit_that_waits_for_the_sites_night_is_an_alarm(log):
    log.line("activate-node")
    log.found("north")
    log.line("activate-node", address="203.0.113.9")
    (event, facts), *_ = log.alarms("north")
    assert (event, facts["address"], facts["before"]) == ("address", "203.0.113.9", "10.0.0.1")


def test_the_address_of_before_a_restart_is_remembered(tmp_path):
    log = Log(tmp_path / "gate.log", {"north": "10.0.0.1"})
    log.line("activate-node", address="203.0.113.9")
    assert [event for event, _ in log.alarms("north")] == ["address"]


def test_a_site_that_restarts_is_no_alarm_and_one_that_is_refused_for_long_is(log):
    log.line("activate-node", "412")
    assert log.alarms("north") == []
    log.line("activate-node", "412")
    assert [event for event, _ in log.alarms("north", after=REFUSED_S + 1)] == ["refused"]
    log.line("activate-node", "412")
    assert log.alarms("north", after=1) == []  # once an hour is enough
    log.line("activate-node")
    log.line("activate-node", "412")
    assert log.alarms("north", after=REFUSED_S + 1) == []


def test_a_certificate_that_is_in_no_list_is_an_alarm_and_a_passer_by_without_one_is_not(log):
    log.line("pull-messages", "400", "", "198.51.100.1", "NONE")
    assert log.alarms() == []
    log.line("pull-messages", "400", "gone", "198.51.100.1", "FAILED:self-signed certificate")
    assert [event for event, _ in log.alarms()] == ["refused"]


def test_strangers_with_ever_other_names_are_one_alarm_and_none_of_them_is_a_site(log):
    for number in range(50):
        name = f"north\x1b[2J{number}" + "x" * 1000
        log.line("pull-messages", "400", name, "198.51.100.1", "FAILED:self-signed certificate")
    ((event, facts),) = log.alarms("north")
    assert (event, facts["site"]) == ("refused", "")
    assert facts["claims"].isprintable()
    assert len(facts["claims"]) <= 80


def test_a_line_that_cannot_be_read_is_passed_over(log):
    log.line("pull-messages")
    with log.path.open("ab") as file:
        file.write(b'{"time": "2026-11-28T12:00:00+00:00", "addre{"path": "/\xff"}\n')
    log.line("pull-messages", address="10.0.0.2")
    assert [facts["address"] for _, _, facts in log.found()] == ["10.0.0.1", "10.0.0.2"]


def test_a_site_that_stays_away_is_an_alarm_once_and_its_return_is_written_down(log):
    log.line("pull-messages")
    log.found("north", "south")
    log.line("pull-messages", site="south")
    found = log.alarms("north", "south", after=MISSING_S + 1)
    assert found == [("missing", {"site": "north", "seconds": round(MISSING_S + 1)})]
    assert log.alarms("north", "south", after=1) == []
    log.line("pull-messages")
    assert [event for event, *_ in log.found("north", "south")] == ["back"]


def test_a_log_that_was_begun_anew_is_read_from_its_beginning(log):
    for _ in range(9):
        log.line("pull-messages")
    log.found("north")
    log.path.write_text("")
    log.line("pull-messages", site="south")
    assert [facts["site"] for _, _, facts in log.found()] == ["south"]


def test_the_command_shows_the_journal_and_says_which_line_is_wrong(provisioned, capsys):
    done = provisioned()
    kit = done.place / "sites" / "cardiology"
    append(kit / "state", "started", site="cardiology")
    append(kit / "state", SENT, id="q1", digest="a1", round=3, epsilon=0.5)
    assert main(["site", "journal", "--kit", str(kit)]) == 0
    said = capsys.readouterr().out
    assert "round=3  epsilon=0.5" in said
    assert "lines: 2, each follows the one before" in said
    append(done.kit.state, RECEIVED, site="cardiology", id="q2", digest="a1")
    words = ["coordinator", "journal", "--kit", str(done.kit.directory)]
    assert main(words) == 0
    assert main([*words, "--site_journal", str(kit / "state")]) == 2
    assert "cardiology has not sent the answer to q2" in capsys.readouterr().err
    changed(kit / "state", lambda lines: lines.pop(0))
    assert main(["site", "journal", "--kit", str(kit)]) == 2
    assert "line 1: is numbered 2" in capsys.readouterr().err
