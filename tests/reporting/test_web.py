"""`fedfora watch --web` shows what the record holds, to nobody else, and changes nothing."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from urllib.parse import unquote

import httpx
import pytest
import uvicorn

from browser import CHROMIUM, Browser
from fedfora.cli.main import main
from fedfora.reporting.history import read_run
from fedfora.reporting.record import PASSING, append_event
from fedfora.reporting.report import report, write_report
from fedfora.reporting.web import find_runs, serve, web_app
from rounds import round_line

TOKEN = "a-token-of-some-length"
ANSWERS = [
    {"input": "note one", "reference": "a_has_b", "prediction": "a_has_b", "site": "north"},
    {"input": "note two", "reference": "c_is_d", "prediction": "x_is_d", "site": "south"},
]
SECRET = "a secret beside the runs"


class Answer:
    """What the application answered."""

    def __init__(self, messages):
        self.status = messages[0]["status"]
        self.headers = {k.decode(): v.decode() for k, v in messages[0]["headers"]}
        self.text = b"".join(m.get("body", b"") for m in messages).decode()


def client(directory, *, loopback=True, token=None, host="localhost:8765"):
    """A function that asks the application for a raw path, as no tidy client would send it."""
    app = web_app(directory, loopback=loopback, token=token)

    def ask(address, method="GET", **headers):
        path, _, query = address.partition("?")
        words = {"host": host, **{name.replace("_", "-"): v for name, v in headers.items()}}
        scope = {
            **{"type": "http", "method": method, "path": unquote(path), "raw_path": path.encode()},
            **{"query_string": query.encode(), "server": ("127.0.0.1", 8765), "scheme": "http"},
            "headers": [(name.encode(), value.encode()) for name, value in words.items()],
            "root_path": "",
        }
        messages = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            messages.append(message)

        asyncio.run(app(scope, receive, send))
        return Answer(messages)

    return ask


@pytest.fixture
def runs(write_run):
    """A directory with two runs, and things that are none of its pages."""
    one = write_run("one", predictions=ANSWERS)
    write_run("two & more", events=[round_line(1)])
    (one.parent / "secret.txt").write_text(SECRET)
    (one / "adapter_model.safetensors").write_text(SECRET)
    (one.parent / "no run").mkdir()
    return one.parent


def contents(directory):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_every_run_has_its_page_and_two_are_compared(runs):
    before = contents(runs)
    web = client(runs)
    index = web("/").text
    addresses = dict(re.findall(r'<a href="(/run/[^"]+)">([^<]+)</a></label>', index))
    assert set(addresses.values()) == {"one", "two &amp; more"}
    for address in addresses:
        assert web(address).status == 200
    assert "note two" in web("/run/one").text
    assert "round 3 of 3" in web("/run/one").text
    compared = web("/compare?run=one&run=two+%26+more").text
    assert "Side by side" in compared
    assert contents(runs) == before


def test_a_run_alone_is_where_the_first_page_leads(runs):
    web = client(runs / "one")
    assert web("/").headers["location"] == "/run/one"
    assert web("/run/one").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/run/..",
        "/run/../secret.txt",
        "/run/..%2fsecret.txt",
        "/run/%2e%2e%2fsecret.txt",
        "/run/one%2f..%2f..%2fsecret.txt",
        "/run/one/adapter_model.safetensors",
        "/run/one/../../secret.txt",
        "/run/%2fetc%2fpasswd",
        "/run//etc/passwd",
        "/run/one%00",
        "/run/secret.txt",
        "/run/no%20run",
        "/compare?run=../secret.txt",
        "/compare?run=one&run=/etc/passwd",
        "/secret.txt",
        "/adapter_model.safetensors",
        "//etc/passwd",
    ],
)
def test_no_address_leads_out_of_the_runs(runs, path):
    answer = client(runs)(path)
    assert answer.status in (404, 307)
    assert SECRET not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", ""]
)
def test_another_name_for_this_machine_is_refused(runs, host):
    """A website whose name points here (DNS rebinding) would read all pages as its own."""
    web = client(runs)
    answer = web("/run/one", host=host)
    assert answer.status == 403
    assert "note one" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost", "[::1]:8765", "LOCALHOST:9"])
def test_this_machines_own_names_are_answered(runs, host):
    web = client(runs)
    assert web("/run/one", host=host).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "MOVE"])
@pytest.mark.parametrize("path", ["/", "/run/one", "/compare?run=one"])
def test_only_reading_is_answered(runs, method, path):
    before = contents(runs)
    web = client(runs)
    assert web(path, method).status == 405
    assert contents(runs) == before


def test_another_address_asks_for_the_token_once(runs):
    web = client(runs, loopback=False, token=TOKEN, host="10.0.0.5:8765")
    for words in ("", "?token=", "?token=wrong", f"?token={TOKEN[:-1]}", "?token=ü"):
        answer = web(f"/run/one{words}")
        assert answer.status == 403
        assert "note one" not in answer.text
        assert TOKEN not in answer.text
    first = web(f"/run/one?token={TOKEN}")
    assert (first.status, first.headers["location"]) == (303, "/")
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    brought = first.headers["set-cookie"].split(";")[0]
    assert "note one" in web("/run/one", cookie=brought).text
    assert web("/run/one", cookie=brought[:-1]).status == 403


def test_a_page_runs_our_script_only_and_asks_nobody_else(runs):
    evil = "<script>alert(1)</script>"
    with (runs / "one" / "metrics.jsonl").open("a") as file:
        line = {"event": "rejected", "site": evil, "round": 4, "reason": evil}
        file.write(json.dumps(line) + "\n")
    web = client(runs)
    answer = web("/run/one")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert answer.headers["cache-control"] == "no-store"
    assert evil not in answer.text
    assert re.findall(r'(?:src|href|action)="([^"#]*)', answer.text)
    for address in re.findall(r'(?:src|href|action)="([^"#]+)', answer.text):
        assert re.match("data:|/(?!/)", address), address


def test_an_unchanged_page_is_not_sent_again(runs):
    web = client(runs)
    tag = web("/run/one").headers["etag"]
    again = web("/run/one", if_none_match=tag)
    assert (again.status, again.text) == (304, "")
    with (runs / "one" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(round_line(4)) + "\n")
    assert web("/run/one", if_none_match=tag).status == 200


def test_a_record_that_cannot_be_read_is_told_and_the_others_stay(runs):
    (runs / "one" / "metrics.jsonl").write_text("{broken\n")
    web = client(runs)
    answer = web("/run/one")
    assert (answer.status, "line 1" in answer.text) == (503, True)
    assert "cannot be read" in web("/").text
    assert web("/run/two%20%26%20more").status == 200


def test_the_round_that_is_on_is_in_the_timeline(write_run):
    run = write_run(events=[round_line(1)])
    append_event(run, "round_started", file=PASSING, round=2, num_rounds=3, sites=["north", "west"])
    step = {"step": 2, "steps": 5, "loss": 1.5, "tokens": 9}
    append_event(run, "site_step", file=PASSING, site="north", **step)
    web = client(run)
    page = web("/run/run").text
    (row,) = re.findall(r"<tr>(?:(?!</tr>).)*></i>north</th>.*?</tr>", page, re.DOTALL)
    assert re.findall(r'<td class="(\w*)" title="[^"]*">([^<]*)', row) == [
        ("in", "✓"),
        ("now", "2/5"),
    ]
    assert re.search(r"></i>west</th>.*?waits", page, re.DOTALL)
    assert "round 2 of 3" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--web"], "nowhere: no such directory"),
        (["."], "is not a run directory"),
        ([".", "--web", "--port", "70000"], "--port must be in [0, 65535]"),
        ([".", "--web", "--once"], "choose one"),
        ([".", "--host", "0.0.0.0"], "need --web"),
        ([".", "--web", "--host", "192.0.2.1"], "assign requested address"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, monkeypatch, capsys, write_run):
    if "192.0.2.1" in words:
        write_run()
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *words]) == 2
    assert message in capsys.readouterr().err


class Served:
    """A server in this process, as `fedfora watch --web` starts it."""

    def __init__(self, directory, monkeypatch, capsys, **options):
        servers = []
        run = uvicorn.Server.run
        monkeypatch.setattr(uvicorn.Server, "run", lambda s, **k: (servers.append(s), run(s, **k)))
        options = {"host": "127.0.0.1", "port": 0, "with_token": False, **options}
        self.thread = threading.Thread(target=serve, args=(directory,), kwargs=options)
        self.thread.start()
        give_up = time.monotonic() + 60
        while not (servers and servers[0].started):
            assert time.monotonic() < give_up
            time.sleep(0.02)
        self.server = servers[0]
        self.said = capsys.readouterr().out
        self.address = re.search(r"http://\S+", self.said)[0]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(timeout=60)


def test_it_listens_at_this_machine_only_unless_told(runs, monkeypatch, capsys):
    with Served(runs, monkeypatch, capsys) as web:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", web.address)
        assert httpx.get(web.address, trust_env=False).status_code == 200
        (bound,) = web.server.servers[0].sockets
        assert bound.getsockname()[0] == "127.0.0.1"
    with Served(runs, monkeypatch, capsys, host="0.0.0.0") as web:
        assert "?token=" in web.address
        assert "not encrypted" in web.said
        with httpx.Client(trust_env=False) as http:
            local = web.address.replace("0.0.0.0", "127.0.0.1")
            assert http.get(local.split("?")[0]).status_code == 403
            assert http.get(local, follow_redirects=True).status_code == 200


def test_the_server_leaves_the_log_handlers_of_its_process_open(runs, monkeypatch, capsys):
    handler = logging.FileHandler(runs / "secret.txt")
    with Served(runs, monkeypatch, capsys):
        assert handler.stream is not None
    handler.close()


def test_a_port_that_is_taken_is_named(runs, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["watch", str(runs), "--web", "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


def test_runs_are_found_newest_first_and_nothing_else(runs):
    assert set(find_runs(runs)) == {"one", "two & more"}
    assert set(find_runs(runs / "one")) == {"one"}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_on_a_phone_wide_tables_scroll_in_their_own_box_and_the_page_does_not(write_run, tmp_path):
    site = "St. Josefs Hospital of the Holy Family, cardiology and intensive care, building 12"
    lines = [json.loads(json.dumps(round_line(n)).replace("north", site)) for n in range(1, 20)]
    answers = [ANSWERS[0] | {"site": site}, ANSWERS[1]]
    run, page = write_run(events=lines, predictions=answers), tmp_path / "page.html"
    write_report([run], page)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.as_uri(), width=390)
        browser.value("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert browser.value("document.documentElement.scrollWidth") == 390
        assert browser.value("document.querySelectorAll('table').length") > 3
        assert browser.value("document.querySelectorAll('table:not(.scroll table)').length") == 0
        box = "document.querySelector('[aria-label=timeline]')"
        assert browser.value(f"{box}.scrollWidth > {box}.clientWidth")
        name = f"{box}.querySelector('tr:nth-child(2) th')"  # stays in sight, beside some rounds
        assert browser.value(f"{name}.offsetWidth < {box}.clientWidth / 2")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1200, False)])
def test_in_a_browser_the_page_follows_the_run_and_keeps_what_one_chose(
    write_run, tmp_path, monkeypatch, capsys, width, dark
):
    run = write_run(predictions=ANSWERS)
    with Served(run, monkeypatch, capsys) as web, Browser(tmp_path / "profile") as browser:
        browser.open(web.address, width=width, dark=dark)
        page = "document.documentElement"
        assert browser.value(f"{page}.scrollWidth <= {width}")  # nothing sticks out
        # By keyboard: to the first choice of answers, and to its second entry.
        browser.value(
            "document.querySelector('#run-1-scores summary, #run-1-over summary').focus()"
        )
        browser.press("Enter", 13)
        assert browser.value("document.activeElement.parentElement.open")
        for _ in range(80):
            browser.press("Tab", 9)
            if browser.value("document.activeElement.tagName") == "SELECT":
                break
        browser.press("ArrowDown", 40)
        shown = "[...document.querySelectorAll('.example')].filter(e => e.offsetHeight).length"
        assert browser.value("document.activeElement.value") == "wrong ones"
        assert browser.value(shown) == 1
        # What the record gains appears; what is open, chosen and has the focus stays.
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(round_line(4)) + "\n")
        more = [*ANSWERS, {**ANSWERS[0], "input": "note three"}]
        lines = "".join(json.dumps(row) + "\n" for row in more)
        (run / "predictions.jsonl").write_text(lines)
        browser.wait("document.querySelectorAll('.example').length == 3")
        browser.wait("document.querySelectorAll('.timeline tr:first-child th').length == 6")
        assert browser.value("document.activeElement.value") == "wrong ones"
        assert browser.value(shown) == 1
        assert browser.value("document.querySelectorAll('details[open] table tr').length") > 0
        assert browser.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_page_that_follows_a_run_leaves_the_reader_where_they_were(
    write_run, tmp_path, monkeypatch, capsys
):
    """In the list of events, and it says what became of a copied command."""
    run = write_run(events=[round_line(n) for n in range(1, 31)])
    with Served(run, monkeypatch, capsys) as web, Browser(tmp_path / "profile") as browser:
        browser.open(web.address)
        timeline = "document.querySelector('[aria-label=timeline]')"
        assert browser.value(f"{timeline}.scrollWidth == {timeline}.clientWidth")  # all in sight
        browser.value("document.querySelector('.commands button').click()")
        browser.wait("document.querySelector('.commands button').textContent != 'copy'")
        events = "document.querySelector('[aria-label=events]')"
        browser.value(f"{events}.scrollTop = 90")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(round_line(31)) + "\n")
        browser.wait(f"{events}.textContent.includes('round 31')")
        assert browser.value(f"{events}.scrollTop") == 90
        assert browser.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_to_send_filters_its_answers_without_a_script(write_run, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(report([read_run(write_run(predictions=ANSWERS))]))
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        shown = "[...document.querySelectorAll('.example')].filter(e => e.offsetHeight)"
        for title, entry, left in (("site", "north", "note one"), ("relation", "is", "note two")):
            assert browser.value(f"{shown}.length") == 2
            choice = f"document.querySelector('select[name$={title}]')"
            browser.value(f"{choice}.value = '{entry}'")
            assert browser.value(f"{shown}.map(e => e.querySelector('p').textContent)") == [left]
            browser.value(f"{choice}.selectedIndex = 0")
        assert browser.complaints == []
