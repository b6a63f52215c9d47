"""Whoever watches from outside sees what the record says, line by line, until the run is over."""

import json
import threading
import time
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedfora.cli.main import main
from fedfora.reporting.board import SITES_SHOWN, Board, render
from fedfora.reporting.follow import Follower
from fedfora.reporting.view import View
from fedfora.reporting.watch import watch
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
    board.draw(["north", "south", "west"])
    board.take({"event": "rejected", "site": "west", "reason": "not finite"})
    board.take(round_line(2, aggregation_error=0.25, epsilon=1.5))
    text = shown(render(board))
    for words in ("north", "in", "2.000", "2.0 KiB", "left out", "not finite"):
        assert words in text
    for words in ("aggregation error 0.250", "epsilon 1.500", "sent 4.0 KiB", "F1 0.200"):
        assert words in text


def test_of_many_sites_the_busy_ones_are_shown():
    board = Board()
    board.draw([f"site {i}" for i in range(100)])
    board.site("site 77").state = "step 3/5"
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
    watcher.join(timeout=30)
    assert not watcher.is_alive()
    assert [line[:9] for line in out.getvalue().splitlines()] == [f"round {n}/3" for n in (1, 2, 3)]


def test_once_shows_where_a_run_stands(write_run, capsys):
    run = write_run(events=[round_line(1), round_line(2)])
    assert main(["watch", str(run), "--once"]) == 0
    text = capsys.readouterr().out
    assert "round 2" in text
    assert "left" in text
    assert "south" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which run?"),
        (["nowhere"], "no such directory"),
        (["nowhere", "--interval_s", "0"], "--interval_s must be in"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(["watch", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_time_is_left_where_nothing_has_been_done(monkeypatch):
    monkeypatch.setattr("fedfora.reporting.view.PLAIN_INTERVAL_S", -1.0)
    out = StringIO()
    with View(10, Console(file=out, width=100)) as view:
        view.advance(0, "starting")
        view.advance(1, "step 1/10", loss=1.5)
    first, second = out.getvalue().splitlines()
    assert first == "starting"
    assert second == "step 1/10  loss 1.500  0:00 left"


def test_a_view_on_a_terminal_draws_the_board_and_elsewhere_prints_lines():
    def frames(*, terminal):
        out = StringIO()
        console = Console(file=out, width=100, force_terminal=terminal, color_system=None)
        with View(10, console) as view:
            view.board.site("north").state = "step 1/5"
            view.line("a line that stays")
            view.advance(1, "round 1/2 north", loss=1.5)
            time.sleep(0.4)
        return out.getvalue()

    assert "step 1/5" in frames(terminal=True)
    plain = frames(terminal=False)
    assert plain == "a line that stays\n"
