"""Laws of every registered metric, and what a score of many rows is."""

import json
import math
import random

import pytest

from fedfora.evaluation import scores as scores_module
from fedfora.evaluation.scores import check_packages, kind_of, score
from fedfora.metrics import KINDS, METRICS, Answer

REFERENCES = {
    "triples": ["a_r_b\nc_s_d", "e_r_f", "水温高_部件故障_风扇"],
    "text": ["The cat sat on the mat.", "发动机水温高，风扇低速转动。", "Take 40 mg twice a day."],
    "choice": ["A", "B", "C"],
}
WRONG = {
    "triples": ["x_y_z", "q_r_w", "x_y_z"],
    "text": ["nothing of that", "完全无关", "xyz"],
    "choice": ["B", "C", "A"],
}
BEST = {"bleu": 100.0, "chrf": 100.0}
# Faithful to their faults: they do not reach 1 at the truth, or exceed it.
FAULTY = {"original_f1"}
BY_KIND = [(kind, name) for kind in KINDS for name in METRICS if kind in METRICS[name].kinds]


def answers(kind, predictions):
    rows = zip(predictions, REFERENCES[kind], strict=True)
    options = ("A", "B", "C") if kind == "choice" else ()
    return [
        Answer(p, r, options=options, likeliest=options.index(p) if options else None)
        for p, r in rows
    ]


@pytest.mark.parametrize(("kind", "name"), BY_KIND)
def test_the_truth_scores_best_and_what_is_wrong_scores_less(kind, name):
    best = score(answers(kind, REFERENCES[kind]), kind, original=True).summary
    worse = score(answers(kind, WRONG[kind]), kind, original=True).summary
    if name not in FAULTY:
        assert best[name] == pytest.approx(BEST.get(name, 1.0))
    if name not in ("parse_rate", "parsed_share"):
        assert worse[name] < 0.3 * best[name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_does_not_matter(kind):
    rows = answers(kind, WRONG[kind][:1] + REFERENCES[kind][1:])
    one, other = score(rows, kind).summary, score(rows[::-1], kind).summary
    for name in one:
        if isinstance(one[name], float):
            assert one[name] == pytest.approx(other[name])


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_its_own_scores_and_their_mean_is_the_whole(kind):
    rows = answers(kind, REFERENCES[kind][:2] + WRONG[kind][2:])
    result = score(rows, kind)
    assert len(result.rows) == 3
    assert all(0 <= value <= 100 for row in result.rows for value in row.values())
    for name in METRICS:
        metric = METRICS[name]
        if kind in metric.kinds and metric.row and name != "chrf":
            mean = sum(row[metric.row] for row in result.rows) / 3
            assert result.summary[name] == pytest.approx(mean)


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_holds_the_score_and_comes_out_the_same_again(kind):
    rng = random.Random(0)
    rows = answers(kind, REFERENCES[kind]) + answers(kind, WRONG[kind])
    rows = [rng.choice(rows) for _ in range(40)]
    one, again = score(rows, kind, seed=3).summary, score(rows, kind, seed=3).summary
    assert one == again
    assert one["intervals"] != score(rows, kind, seed=4).summary["intervals"]
    for name, (low, high) in one["intervals"].items():
        assert low <= one[name] <= high, name


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_json(kind):
    summary = score(answers(kind, REFERENCES[kind]), kind).summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize("kind", KINDS)
def test_the_references_tell_the_kind(kind):
    assert kind_of(REFERENCES[kind]) == kind


def test_rows_with_options_are_a_choice():
    assert kind_of(["positive", "negative"], with_options=True) == "choice"
    assert kind_of(["positive", "negative"]) == "text"


def test_a_missing_package_is_an_error_that_names_the_command(monkeypatch):
    monkeypatch.setattr(scores_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'rouge_score and sacrebleu: pip install "fedfora\[eval'):
        check_packages("text")
    check_packages("triples")


def test_without_the_packages_the_others_are_scored_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(scores_module, "find_spec", lambda name: None)
    summary = score(answers("text", REFERENCES["text"]), "text").summary
    assert summary["token_f1"] == 1
    assert "rouge1" not in summary
    assert "rougeL" in caplog.text


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no rows"):
        score([], "text")
    with pytest.raises(ValueError, match="unknown metrics 'texts'"):
        score([Answer("a", "b")], "texts")


def test_a_choice_without_likelihoods_has_no_likelihood_accuracy():
    summary = score([Answer("A", "A"), Answer("B", "C")], "choice").summary
    assert "likelihood_accuracy" not in summary
    assert not any(isinstance(v, float) and math.isnan(v) for v in summary.values())
