"""Whoever watches from outside sees what the record says, line by line, until the run is over."""

import json
import os
import threading
import time
from io import StringIO
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedfora.cli.main import main
from fedfora.reporting.history import Follower, read_run
from fedfora.reporting.record import PASSING, RunRecord, append_event
from fedfora.reporting.view import SITES_SHOWN, Board, View, render
from fedfora.reporting.watch import RunsBoard, RunStatus, watch
from fedfora.reporting.web import status_words
from rounds import round_line

FINISHED = {"event": "finished", "seconds": 9.0, "wall_seconds": 9.0, "peak_memory_bytes": 1}


def shown(renderable, *, terminal=False):
    out = StringIO()
    Console(file=out, width=120, force_terminal=terminal, color_system=None).print(renderable)
    return out.getvalue()


@given(st.lists(st.integers(1, 30), max_size=12))
def test_however_the_file_grows_every_event_comes_once(tmp_path_factory, pieces):
    directory = tmp_path_factory.mktemp("grows")
    events = [{"event": "round", "round": n, "site": "Köln"} for n in range(5)]
    text = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in events).encode()
    follower, seen, written = Follower(directory), [], 0
    for length in [*pieces, len(text)]:
        with (directory / "metrics.jsonl").open("ab") as file:
            file.write(text[written : written + length])
        written += length
        seen += follower.new()
    assert seen == events


def test_a_record_that_was_cut_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "round"}\n{"event": "round"}\n')
    follower = Follower(tmp_path)
    assert len(follower.new()) == 2
    path.write_text('{"event": "resumed"}\n')
    assert follower.new() == [{"event": "resumed"}]


@given(st.integers(0, 6), st.integers(0, 6))
def test_of_a_record_that_was_cut_and_goes_on_only_what_is_new_comes(tmp_path_factory, kept, more):
    """However much is cut, and also where it has grown beyond its old length since."""
    directory = tmp_path_factory.mktemp("cut")
    path, follower = directory / "metrics.jsonl", Follower(directory)
    before = [{"round": number} for number in range(6)]
    after = [{"after": number} for number in range(more)]
    path.write_text("".join(json.dumps(event) + "\n" for event in before))
    assert follower.new() == before
    path.write_text("".join(json.dumps(event) + "\n" for event in before[:kept] + after))
    assert follower.new() == after
    assert follower.new() == []


def test_the_board_says_sites_losses_bytes_error_and_epsilon():
    board = Board()
    board.take({"event": "round_started", "round": 1, "sites": ["north", "south", "west"]})
    board.take({"event": "rejected", "site": "west", "reason": "not finite"})
    board.take(round_line(2, aggregation_error=0.25, epsilon=1.5))
    text = shown(render(board))
    for words in ("north", "in", "2.000", "2.0 KiB", "left out", "not finite"):
        assert words in text
    for words in ("aggregation error 0.250", "epsilon 1.500", "sent 4.0 KiB", "F1 0.200"):
        assert words in text


def test_of_many_sites_the_busy_ones_are_shown():
    board = Board()
    board.take({"event": "round_started", "round": 1, "sites": [f"site {i}" for i in range(100)]})
    board.sites["site 77"].state = "step 3/5"
    text = shown(render(board))
    assert "site 77" in text
    assert f"and {100 - SITES_SHOWN} more" in text


def test_without_a_terminal_there_is_one_line_a_round(write_run):
    run = write_run(events=[round_line(1), round_line(2), FINISHED])
    out = StringIO()
    watch(run, Console(file=out, width=200), interval_s=0.05)
    lines = out.getvalue().splitlines()
    assert [line.split("   ")[0] for line in lines] == ["round 1/3", "round 2/3"]
    assert "training loss 2.000" in lines[1]


def test_what_a_site_is_called_is_no_markup():
    """A name with [/red] in it ended the watch with an error."""
    board = Board()
    board.take({"event": "round_started", "round": 1, "sites": ["[/red]"]})
    assert "[/red]" in shown(render(board))


def test_it_follows_a_run_that_goes_on(write_run):
    run = write_run(events=[round_line(1)])
    out = StringIO()
    watcher = threading.Thread(
        target=watch, args=(run, Console(file=out, width=200)), kwargs={"interval_s": 0.05}
    )
    watcher.start()
    for event in (round_line(2), round_line(3), FINISHED):
        time.sleep(0.1)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")
    watcher.join(timeout=120)
    assert not watcher.is_alive()
    assert [line[:9] for line in out.getvalue().splitlines()] == [f"round {n}/3" for n in (1, 2, 3)]


@pytest.mark.parametrize("words", ["RUN --once", "--once RUN", "--interval_s 1 --once RUN"])
def test_once_shows_where_a_run_stands(write_run, capsys, words):
    run = write_run(events=[round_line(1), round_line(2)])
    assert main(["watch", *words.replace("RUN", str(run)).split()]) == 0
    text = capsys.readouterr().out
    assert "round 2" in text
    assert "left" in text
    assert "south" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run given"),
        (["nowhere"], "no such directory"),
        (["nowhere", "--interval_s", "0"], "--interval_s must be in"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(["watch", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_time_left_follows_the_pace_of_steps_and_not_the_time_of_loading(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fedfora.reporting.view.PLAIN_INTERVAL_S", -1.0)
    monkeypatch.setattr("fedfora.reporting.view.time", SimpleNamespace(monotonic=lambda: now[0]))
    out = StringIO()
    with View(10, Console(file=out, width=100)) as view:
        view.advance(0, "starting")
        now[0] = 100.0  # libraries, base and rows have been loaded, and a step was taken
        view.advance(1, "step 1/10", loss=1.5)
        now[0] = 102.0
        view.advance(1, "step 2/10", loss=1.25)
    assert out.getvalue().splitlines() == [
        "starting",
        "step 1/10  loss 1.500",
        "step 2/10  loss 1.250  0:16 left",
    ]


def test_a_view_on_a_terminal_draws_the_board_and_elsewhere_prints_lines():
    def frames(*, terminal):
        out = StringIO()
        console = Console(file=out, width=100, force_terminal=terminal, color_system=None)
        with View(10, console) as view:
            view.board.sites["north"].state = "step 1/5"
            view.line("a line that stays")
            view.advance(1, "round 1/2 north", loss=1.5)
            time.sleep(0.4)
        return out.getvalue()

    assert "step 1/5" in frames(terminal=True)
    plain = frames(terminal=False)
    assert plain == "a line that stays\n"


# Whoever runs a daemon sees below its lines the run that is on, as the run's own files tell it.


def console(*, terminal):
    return Console(file=StringIO(), width=100, force_terminal=terminal, color_system=None)


def add(run, *events):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def begin_round(run, number, sites):
    """What a run tells of a round that begins."""
    values = {"round": number, "num_rounds": 3, "sites": sites}
    append_event(run, "round_started", file=PASSING, **values)


def note_sent(run, site):
    """What a run tells of a site that has sent."""
    append_event(run, "site_sent", file=PASSING, site=site)


def wait_for(board, words):
    """Wait until a frame with these words is drawn."""
    give_up = time.monotonic() + 120
    while words not in board.console.file.getvalue():
        assert time.monotonic() < give_up, board.console.file.getvalue()
        time.sleep(0.05)


def states(standing):
    return {name: site.state for name, site in standing.board.sites.items()}


def test_a_round_that_is_on_says_who_has_sent_and_who_is_waited_for(write_run):
    run = write_run(events=[])
    standing = RunStatus(read_run(run))
    begin_round(run, 1, ["north", "south", "west"])
    note_sent(run, "south")
    standing.update()
    assert states(standing) == {"north": "waits", "south": "sent", "west": "waits"}
    add(run, {"event": "rejected", "round": 1, "site": "west", "reason": "NaN"}, round_line(1))
    standing.update()
    assert states(standing) == {"north": "in", "south": "in", "west": "left out"}
    begin_round(run, 2, ["north", "south"])
    standing.update()
    assert states(standing) == {"north": "waits", "south": "waits", "west": "rests"}


def test_sites_are_seen_training_from_outside(write_run):
    run = write_run(events=[])
    standing = RunStatus(read_run(run))
    begin_round(run, 1, ["north", "south"])
    step = {"site": "north", "step": 3, "steps": 5, "tokens": 90, "loss": 1.5}
    append_event(run, "site_step", file=PASSING, **step)
    standing.update()
    assert states(standing) == {"north": "step 3/5", "south": "waits"}
    assert standing.board.sites["north"].loss == 1.5
    assert standing.position == 0  # the round is not over


def test_events_of_both_files_come_in_the_order_in_which_they_happened(write_run):
    """A look that finds a round's end and the next one's beginning shows the next one."""
    run = write_run(events=[])
    standing = RunStatus(read_run(run))
    append_event(run, **round_line(1, sites=("north",)))
    begin_round(run, 2, ["north"])
    standing.update()
    assert states(standing) == {"north": "waits"}


def test_listeners_hear_what_the_record_keeps_and_what_passes_by(tmp_path):
    heard = []
    record = RunRecord(tmp_path, overwrite=False, listeners=[heard.append])
    record.announce("round_started", round=1, num_rounds=1, sites=["a"])
    record.log("round", round=1)
    record.tell({"event": "step", "step": 1})
    kept, passing = Follower(tmp_path), Follower(tmp_path, PASSING)
    assert [event["event"] for event in heard] == ["round_started", "round", "step"]
    assert [*passing.new(), *kept.new()] == heard[:2]
    assert all(abs(event["time"] - time.time()) < 60 for event in heard[:2])
    record.announce("round_started", round=2, num_rounds=2, sites=["a"])
    assert [event["round"] for event in passing.new()] == [2]  # what passed in round 1 is gone


def test_who_is_left_out_of_a_round_that_is_on_stays_so(write_run):
    run = write_run(events=[])
    standing = RunStatus(read_run(run))
    begin_round(run, 1, ["north", "west"])
    standing.update()
    add(run, {"event": "rejected", "round": 1, "site": "west", "reason": "NaN"})
    note_sent(run, "north")
    standing.update()
    assert states(standing) == {"north": "sent", "west": "left out"}


def test_a_round_that_is_repeated_after_a_stop_is_counted_once(write_run):
    run = write_run(events=[round_line(1), round_line(2)])
    standing = RunStatus(read_run(run))
    assert len(standing.update()) == 2
    sent = standing.board.sent_bytes
    kept = json.dumps(round_line(1)) + "\n"
    (run / "metrics.jsonl").write_text(kept)
    add(run, {"event": "resumed", "after_round": 1}, {**round_line(2), "seconds": 9.0})
    assert [line[:9] for line in standing.update()] == ["round 2/3"]
    assert standing.board.sent_bytes == sent


def test_the_arms_that_come_after_the_rounds_count_in_the_time_left(write_run):
    run = write_run(events=[round_line(1) | {"seconds": 10.0, "time": time.time()}])
    alone = RunStatus(read_run(run))
    alone.update()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["federation"]["compare"] = ["base", "alone", "central"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    standing = RunStatus(read_run(run))
    standing.update()
    # Two rounds are left; two sites alone, and central on the rows of both, are two federations.
    assert alone._seconds_left() == pytest.approx(20, abs=2)
    assert standing._seconds_left() == pytest.approx(20 + 2 * 30, abs=2)
    assert "left, with 3 arms to compare" in standing.clock()
    rounds = [round_line(n) | {"seconds": 10.0 * n, "time": time.time()} for n in (2, 3)]
    add(run, *rounds, FINISHED)
    standing.update()
    alone.update()
    assert (alone.over, standing.over) == (True, False)
    row = {"event": "row", "kind": "alone", "scores": {}, "groups": {}, "time": time.time()}
    for name, left in (("north, alone", 2), ("south, alone", 1)):
        add(run, row | {"name": name})
        standing.update()
        assert f"with {left} arm" in standing.clock()
        assert not standing.over
    add(run, row | {"name": "central", "kind": "central"})
    standing.update()
    assert standing.over


def test_a_run_that_was_killed_seems_to_have_stopped_and_counts_nothing_down(
    write_run, monkeypatch
):
    began, now = 1.7e9, [0.0]
    clock = SimpleNamespace(time=lambda: now[0], strftime=time.strftime, localtime=time.localtime)
    monkeypatch.setattr("fedfora.reporting.watch.time", clock)
    run = write_run(
        events=[round_line(n) | {"seconds": 10.0 * n, "time": began + 10 * n} for n in (1, 2)]
    )
    standing = RunStatus(read_run(run))

    def told_at(seconds):
        now[0] = began + seconds
        standing.update()
        return status_words(standing)

    def stopped(seconds):
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(began + seconds))
        return f"round 2 of 3, seems to have stopped at {at}"

    assert told_at(23) == "round 2 of 3, 0:07 left"
    assert told_at(75) == "round 2 of 3"  # late, and nobody can say how long
    assert told_at(81) == told_at(90_000) == stopped(20)
    add(run, {"event": "resumed", "after_round": 2, "time": began + 90_000})
    assert told_at(90_003) == "round 2 of 3, 0:07 left"  # how long it lay there is no pause of it
    assert told_at(90_100) == stopped(90_000)


def test_a_round_longer_than_any_before_has_not_stopped(write_run, monkeypatch):
    """Nothing says how long a first round may be silent, or those who pause between lines."""
    now = [1.7e9]
    clock = SimpleNamespace(time=lambda: now[0])
    monkeypatch.setattr("fedfora.reporting.watch.time", clock)
    first = RunStatus(read_run(write_run("first", events=[{"event": "joined", "time": now[0]}])))
    first.update()
    lines = [round_line(1) | {"seconds": 100.0, "time": now[0]}]
    lines.append({"event": "waiting", "round": 2, "pause": 1, "reason": "", "time": now[0] + 400})
    paused = RunStatus(read_run(write_run("paused", events=lines)))
    paused.update()
    now[0] += 400 + 1999
    assert "last line 39 min 59 s ago" in first.clock()
    assert paused.clock() == "last line 33 min 19 s ago"


def test_the_newest_run_is_shown_on_a_terminal_below_the_lines(write_run, tmp_path):
    old = write_run("001", events=[round_line(1)])
    os.utime(old / "metrics.jsonl", (1, 1))
    with RunsBoard(tmp_path, console(terminal=True)) as board:
        run = write_run("002", events=[round_line(1), round_line(2)])
        begin_round(run, 3, ["north", "south"])
        note_sent(run, "south")
        board.line("site [north] is let in")
        wait_for(board, "002")
    text = board.console.file.getvalue()
    assert "site [north] is let in" in text
    frame = text[text.rindex("002") :]
    assert "001" not in text
    for words in ("waits", "sent 8.0 KiB", "round 3", " left", "F1 0.200"):
        assert words in frame


def test_without_a_terminal_there_are_only_the_lines(write_run, tmp_path):
    with RunsBoard(tmp_path, console(terminal=False)) as board:
        write_run("001", events=[round_line(1)])
        board.line("a line")
        time.sleep(0.3)
    assert board.console.file.getvalue() == "a line\n"


def test_what_is_broken_while_it_is_written_does_not_end_the_board(write_run, tmp_path):
    with RunsBoard(tmp_path, console(terminal=True)) as board:
        run = write_run("001", events=[round_line(1)])
        (run / "config.yaml").write_text("{")
        time.sleep(1)
        assert board.live._refresh_thread.is_alive()
        broken = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(broken.replace("{", "run: {}"))
        wait_for(board, "001")


@pytest.mark.parametrize(
    ("total", "told"), [(2403, "about 3:20:00 to go: 2,400 steps of 5.0 s"), (20, "")]
)
def test_long_work_is_announced_once_and_short_work_not_at_all(total, told, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fedfora.reporting.view.time.monotonic", lambda: now[0])
    view = View(total, Console(file=StringIO(), width=120))
    for seconds in (30, 5, 5, 5, 5):  # the first step loads kernels: it does not count
        now[0] += seconds
        view.advance(1, "round 1/9 cardiology")
    shown = view.console.file.getvalue()
    assert shown.count("to go") == bool(told)
    assert told in shown


def test_scoring_the_base_says_nothing_of_a_steps_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fedfora.reporting.view.time.monotonic", lambda: now[0])
    view = View(1000, Console(file=StringIO(), width=120))
    view.take({"event": "evaluated", "rows": 10})
    view.take({"event": "round_started", "round": 1, "num_rounds": 9, "sites": ["north"]})
    for step, seconds in ((1, 60), (2, 1), (3, 1), (4, 1)):
        now[0] += seconds
        view.take({"event": "site_step", "site": "north", "step": step, "steps": 9, "tokens": step})
    assert "steps of 1.0 s" in view.console.file.getvalue()
