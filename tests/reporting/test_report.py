"""The page shows what the record holds, asks for nothing from outside, and renders in a browser."""

import base64
import csv
import json
import re
import subprocess
from html.parser import HTMLParser

import pytest

from browser import CHROMIUM
from fedfora.cli.main import main
from fedfora.cli.simulate import print_comparison
from fedfora.reporting.card import card_of
from fedfora.reporting.history import read_run
from fedfora.reporting.report import report
from fedfora.reporting.sections import facts
from rounds import round_line

PREDICTIONS = [
    {
        "instruction": "List:",
        "input": "note one",
        "reference": "a_b_c\nd_e_f",
        "prediction": "a_b_c",
    },
    {
        "instruction": "List:",
        "input": "note two",
        "reference": "g_h_i",
        "prediction": "g_h_i\nx_y_z",
    },
    {"instruction": "List:", "input": "note three", "reference": "j_k_l", "prediction": "j_k_l"},
]
VOID = {"meta", "link"}


class Tree(HTMLParser):
    """Checks that what is opened is closed, and keeps the words."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(page):
    tree = Tree()
    tree.feed(page)
    assert not tree.open
    return tree, re.sub(r"\s+", " ", " ".join(tree.words))


def test_the_page_shows_what_the_record_holds(write_run):
    events = [
        round_line(
            n,
            aggregation_error=0.1 / n,
            epsilon=0.5 * n,
            delta=1e-5,
            gizmo_gain=3.5 + n,
            rejected=[{"site": "east", "reason": "update 40 times the median"}],
        )
        for n in (1, 2, 3)
    ]
    command = "fedfora simulate --num_rounds 3"
    run = write_run(
        events=events, predictions=PREDICTIONS, command=command, base_fingerprint="f00d"
    )
    _, words = read(report([read_run(run)]))
    for shown in (
        "A federation of 2 sites, 3 of 3 rounds",
        "12.0 KiB",  # 3 rounds of 2 sites, 2 KiB each
        "epsilon = 1.5, delta = 1e-05",
        "aggregation error",
        "gizmo gain",  # nobody told the report of this one
        "update 40 times the median",
        "differ from what was expected: 2 of 3;",
        "d_e_f",
        command,
        "f00d",
        "lora_rank",
    ):
        assert shown in words, shown


def test_what_sites_hide_is_a_dash(write_run):
    hidden = ("loss", "answer_tokens", "tokens", "rows", "seconds")
    events = [round_line(n) for n in (1, 2)]
    open_page = report([read_run(write_run("open", events=events))])
    for line in events:
        for site in line["sites"]:
            for name in hidden:
                site.pop(name, None)
    hidden_page = report([read_run(write_run("hidden", events=events))])
    explained = "A dash stands for what only the site itself knows"
    assert explained not in open_page
    assert explained in hidden_page
    assert hidden_page.count("<td>-</td>") == 2 * 5  # rows, tokens, share, loss, time of two sites


def test_a_run_has_one_color_in_all_charts(write_run):
    second = [round_line(n) for n in (1, 2)]
    for line in second:
        line.pop("aggregation_error", None)
    first, third = (
        [round_line(n, aggregation_error=scale / n) for n in (1, 2)] for scale in (0.1, 0.2)
    )
    runs = [
        read_run(write_run(name, events=events))
        for name, events in (("first", first), ("second", second), ("third", third))
    ]
    page = report(runs).split('<section class="run"')[0]
    (chart,) = re.findall(r"<h3>aggregation error</h3>.*?</figure>", page, re.DOTALL)
    assert re.findall(r'style="stroke:var\(--c(\d)\)"/></svg>(\w+)', chart) == [
        ("0", "first"),
        ("2", "third"),
    ]
    assert 'stroke:var(--c2)" stroke-dasharray' in chart


def test_what_was_not_measured_is_not_mentioned(write_run):
    events = [{"event": "step", "step": n, "loss": 1.0 / n, "seconds": 1.0 * n} for n in (1, 2)]
    run = write_run(events=events)
    (run / "config.yaml").write_text("adapter: {lora_rank: 4}\n")
    _, words = read("<html>" + report([read_run(run)]).split("</head>")[1])
    for absent in ("epsilon", "Rejections", "Answers", "Evaluation card", "traffic", "sent"):
        assert absent not in words


def prediction_run(write_run, scores, rows):
    run = write_run(
        events=[{"event": "predicted", "rows_per_s": 0.2695351429896453}], predictions=rows
    )
    (run / "config.yaml").write_text("model: {model_name_or_path: smol}\n")
    (run / "scores.json").write_text(json.dumps({"rows": len(rows), **scores}))
    return read_run(run)


def test_a_choice_has_its_accuracy_in_front_and_is_right_as_it_was_scored(write_run):
    rows = [
        {
            "input": f"question {n}",
            "reference": "no",
            "prediction": said,
            "options": ["yes", "no"],
            "scores": {"exact_match": 0.0, "correct": correct},
        }
        for n, (said, correct) in enumerate([("No", 1.0), ("yes", 0.0)])
    ]
    scores = {"metrics": "choice", "exact_match": 0.0, "accuracy": 0.5, "likelihood_accuracy": 1.0}
    run = prediction_run(write_run, scores, rows)
    page = report([run])
    assert facts(run, card_of(run))[0] == ("accuracy, as written", "0.500")
    assert "accuracy, as written</th><th>accuracy, by likelihood</th>" in page
    assert '<li class="found">No</li>' in page
    assert '<li class="wrong">yes</li>' in page
    assert "differ from what was expected: 1 of 2;" in page
    assert "Rejections" not in page
    assert "0.26953" not in page


def test_text_has_rouge_and_chrf_in_front_and_is_not_right_or_wrong(write_run):
    row = {"input": "q", "reference": "rest two days", "prediction": "rest for two days"}
    rows = [{**row, "scores": {"exact_match": 0.0, "token_f1": 0.8, "rougeL": 0.857}}]
    scores = {"exact_match": 0.0, "token_f1": 0.8, "rougeL": 0.857, "chrf": 61.0}
    run = prediction_run(write_run, scores, rows)
    page = report([run])
    assert facts(run, card_of(run))[:2] == [("ROUGE-L", "0.857"), ("chrF (0 to 100)", "61.000")]
    assert "differ from what" not in page
    assert "predicted, ROUGE-L 0.857" in page
    assert '<li class="wrong">' not in page


def test_triples_in_another_spelling_are_marked_as_they_are_scored(write_run):
    rows = [{"input": "q", "reference": "a_b_c", "prediction": "a _ b_c", "scores": {"f1": 1.0}}]
    page = report([prediction_run(write_run, {"f1": 1.0}, rows)])
    assert '<li class="found">a _ b_c</li>' in page


def test_a_short_training_shows_its_last_loss_as_the_last(write_run):
    steps = [{"event": "step", "step": n, "loss": 4.0 / n, "seconds": 1.0 * n} for n in (1, 2, 4)]
    run = write_run(events=[*steps, {"event": "trained", "steps": 4, "loss": 2.333}])
    (run / "config.yaml").write_text("adapter: {lora_rank: 4}\n")
    page = report([read_run(run)])
    assert "<dt>training loss, last</dt><dd>1.000</dd>" in page
    assert "<polyline" in page


def test_test_rows_are_announced_and_can_be_left_out(write_run, capsys):
    run = write_run(predictions=PREDICTIONS)
    assert main(["report", str(run)]) == 0
    assert "This page shows 3 test rows as they are" in (run / "report.html").read_text()
    assert main(["report", str(run), "--no_examples"]) == 0
    page = (run / "report.html").read_text()
    assert "test rows as they are" not in page
    assert not any(row["input"] in page for row in PREDICTIONS)


def test_names_and_answers_cannot_become_markup(write_run):
    evil = "<script>alert(1)</script>"
    events = [round_line(n, sites=(evil,), note=[{"reason": evil}]) for n in (1, 2)]
    row = {"input": evil, "reference": evil, "prediction": evil + "\n" + evil}
    run = write_run(events=events, predictions=[row], command=evil)
    tree, words = read(report([read_run(run), read_run(run)]))
    assert "script" not in {tag for tag, _ in tree.tags}
    assert evil in words


def test_the_page_asks_for_nothing_from_outside(write_run):
    page = report([read_run(write_run(predictions=PREDICTIONS))])
    tree, _ = read(page)
    addresses = [a[key] for _, a in tree.tags for key in ("href", "src") if key in a]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in page
    assert "@import" not in page


def test_runs_side_by_side_show_where_they_differ(write_run):
    one, two = write_run("one"), write_run("two")
    config = (two / "config.yaml").read_text()
    (two / "config.yaml").write_text(config.replace("fedavg", "refactor"))
    _, words = read(report([read_run(one), read_run(two)]))
    assert "aggregation fedavg refactor" in words
    assert "lora rank 4 4" not in words  # the same in both
    assert "Curves of all runs" in words


def test_many_sites_fit(write_run):
    sites = tuple(f"site {i}" for i in range(200))
    page = report([read_run(write_run(events=[round_line(n, sites=sites) for n in (1, 2)]))])
    _, words = read(page)
    assert "lowest of 200 sites" in words


def test_the_command_writes_the_page_and_names_mistakes(write_run, tmp_path, capsys, monkeypatch):
    one, two = write_run("one"), write_run("two")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(one)]) == 0
    assert (one / "report.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(one), str(two)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert main(["report", str(one), "--output_file", "no/where.html"]) == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert main(["report"]) == 2
    errors = capsys.readouterr().err
    for said in ("no such directory: no", "nowhere: no such directory", "no run given"):
        assert said in errors


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("size", ["390,844", "1200,900"])
def test_a_browser_renders_the_page_without_complaint(write_run, tmp_path, size):
    events = [round_line(n, epsilon=0.5 * n) for n in (1, 2, 3)]
    run = write_run(events=events, predictions=PREDICTIONS, command="fedfora simulate")
    page = tmp_path / "page.html"
    page.write_text(report([read_run(run)]))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"]
    shown = tmp_path / "page.png"
    printed = {}
    for task in (f"--screenshot={shown}", "--dump-dom"):
        words = [*command, task, page.as_uri()]
        printed[task] = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in printed[task].stderr
    assert shown.stat().st_size > 5_000
    assert "<polyline" in printed["--dump-dom"].stdout


def test_many_scores_leave_the_usual_ones_in_the_table_and_none_out_of_the_page(write_run):
    scores = {"rows": 7, "f1": 0.5, "macro_f1": 0.4, "gizmo_rate": 0.3}
    run = write_run(events=[round_line(n, scores=scores) for n in (1, 2)])
    page = report([read_run(run)])
    _, words = read(page)
    assert page.index("other scores") < page.index("gizmo rate")
    assert page.index(">F1<") < page.index("other scores")
    assert "0.300" in words


def compared(write_run):
    """A run with every way of training; of each its score on all rows and on each site's own."""
    rows = [("base", "base", 0.1), ("federated", "federated", 0.75), ("central", "central", 0.8)]
    rows += [
        (f"{site}, alone", "alone", value) for site, value in (("north", 0.25), ("south", 0.5))
    ]
    events = [round_line(1, time=1e9), round_line(2, time=1e9 + 60)]
    for name, kind, value in rows:
        groups = {site: {"f1": value + more} for site, more in (("north", 0.0), ("south", 0.1))}
        score = {"f1": value, "rows": 9, "intervals": {"f1": [value - 0.05, value + 0.1]}}
        events.append(
            {"event": "row", "name": name, "kind": kind, "scores": score, "groups": groups}
        )
    return read_run(write_run(events=events))


def test_bars_and_dots_lie_at_their_scores(write_run):
    page = report([compared(write_run)])
    gain, own = re.findall(r'<table class="bars">.*?</table>', page, re.DOTALL)
    bars = re.findall(r'scope="row">([^<]*).*?class="bar" style="width:([\d.]+)%', gain, re.DOTALL)
    assert {name: float(width) for name, width in bars} == {
        "base": 10,
        "alone, mean of 2": 37.5,
        "federated": 75,
        "central": 80,
    }
    reach = re.findall(r'class="reach" style="left:([\d.]+)%;width:([\d.]+)%', gain)
    around = [(5, 15), (25, 25), (70, 15), (75, 15)]  # of the sites alone: the worst to the best
    for found, expected in zip(reach, around, strict=True):
        assert tuple(map(float, found)) == pytest.approx(expected)
    rows = re.findall(r'scope="row">(north|south)<.*?</tr>', own, re.DOTALL)
    assert rows == ["north", "south"]
    for site, arms in (("north", (10, 25, 75, 80)), ("south", (20, 60, 85, 90))):
        (row,) = re.findall(rf'scope="row">{site}<.*?</tr>', own, re.DOTALL)
        dots = re.findall(r'class="dot \w+" style="left:([\d.]+)%', row)
        assert tuple(map(float, dots)) == pytest.approx(arms)
        assert f"+{(arms[2] - arms[1]) / 100:.3f}" in row


def test_the_table_on_a_narrow_terminal_cuts_no_number_and_no_heading(write_run, capsys):
    numbers = {"token_f1": 1.0, "rougeL": 1.0, "bleu": 100.0, "chrf": 100.0, "exact_match": 1.0}
    more = {"peak_memory_bytes": 674 * 2**20, "wall_seconds": 231.0}
    events = [round_line(1)] + [
        {"event": "row", "name": kind, "kind": kind, "scores": {"rows": 9, **numbers}, **more}
        for kind in ("base", "federated", "alone")
    ]
    print_comparison(write_run(events=events), "All test rows")
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    (federated,) = (line.split() for line in shown.splitlines() if "federated" in line)
    assert federated[1:6] == ["1.000", "1.000", "100.000", "100.000", "1.000"]
    assert federated[6:] == ["2", "674", "3:51"]


def test_the_page_has_the_order_in_which_its_readers_ask(write_run):
    page = report([compared(write_run)])
    parts = ("gain", "over", "timeline", "privacy", "scores", "events", "more", "do")
    places = [page.index(f'id="run-1-{part}"') for part in parts]
    assert places == sorted(places)
    _, words = read(page)
    assert re.search(r"F1 0.750 for the federation on 9 held-out rows *; 0.100 for the base", words)
    assert "alone, mean of 2 0.375" in words  # beside the curve
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d", words)


def test_the_timeline_tells_who_was_in_late_left_out_and_not_asked(write_run):
    events = [
        round_line(1, sites=["site 2", "site 10"]),
        {"event": "rejected", "round": 2, "site": "site 2", "reason": "not finite"},
        {"event": "rejected", "round": 2, "site": "site 3", "reason": "no answer within 60 s"},
        round_line(2, sites=["site 10"], rejected=[{"site": "site 2", "reason": "not finite"}]),
    ]
    page = report([read_run(write_run(events=events))])
    table = page[page.index('<table class="timeline">') :].split("</table>")[0]
    rows = re.findall(r"</i>(site \d+)</th>(.*?)</tr>", table, re.DOTALL)
    cells = {site: re.findall(r'<td class="(\w*)" title', row) for site, row in rows}
    assert list(cells.items()) == [  # two before ten
        ("site 2", ["in", "out"]),
        ("site 3", ["", "late"]),
        ("site 10", ["in", "in"]),
    ]
    assert "left out: not finite" in dict(rows)["site 2"]


def test_a_site_has_one_color_on_the_whole_page(write_run):
    page = report([compared(write_run)])
    for site, color in (("north", 0), ("south", 1)):
        entries = re.findall(rf'style="stroke:([^"]+)"/></svg>{site}', page)
        dots = re.findall(rf'<i style="background:([^"]+)"></i>{site}<', page)
        assert {*entries, *dots} == {f"var(--c{color})"}


def test_what_was_spent_stands_beside_the_budget(write_run):
    run = write_run(events=[round_line(1, epsilon=1.5, delta=1e-5)])
    with (run / "config.yaml").open("a") as file:
        file.write("privacy: {target_epsilon: 8.0, privacy_unit: site}\n")
    tree, words = read(report([read_run(run)]))
    (meter,) = [values for tag, values in tree.tags if tag == "meter"]
    assert (float(meter["value"]), float(meter["max"])) == (1.5, 8.0)
    assert "epsilon 1.500 of a budget of 8" in words


def test_the_page_carries_its_numbers_as_files(write_run):
    run = compared(write_run)
    tree, _ = read(report([run]))
    links = {
        values["download"]: values["href"] for tag, values in tree.tags if "download" in values
    }
    content = {name: base64.b64decode(link.split(",")[1]).decode() for name, link in links.items()}
    assert json.loads(content["run-card.json"]) == json.loads(json.dumps(card_of(run)))
    rows = list(csv.DictReader(content["run-metrics.csv"].splitlines()))
    losses = {
        (row["site"], row["round"]): row["value"] for row in rows if row["measurement"] == "loss"
    }
    assert losses == {
        **{("", str(n)): str(4.0 / n) for n in (1, 2)},
        **{("north", str(n)): str(4.0 / n) for n in (1, 2)},
        **{("south", str(n)): str(5.0 / n) for n in (1, 2)},
    }
