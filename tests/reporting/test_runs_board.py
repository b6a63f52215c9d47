"""Whoever runs a daemon sees below its lines the run that is on, as the run's own files tell it."""

import json
import os
import time
from io import StringIO

from rich.console import Console

from fedfora.reporting.current_round import begin_round, no_round, note_sent, read_round
from fedfora.reporting.history import read_run
from fedfora.reporting.runs_board import RunsBoard
from fedfora.reporting.standing import RunStatus
from rounds import round_line


def console(*, terminal):
    return Console(file=StringIO(), width=100, force_terminal=terminal, color_system=None)


def add(run, *events):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def wait_for(board, words):
    """Wait until a frame with these words is drawn."""
    give_up = time.monotonic() + 30
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
    no_round(run)
    assert read_round(run) is None


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
        assert board._live._refresh_thread.is_alive()
        broken = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(broken.replace("{", "run: {}"))
        wait_for(board, "001")
