"""An event in words: every kind that a run records, whatever may be missing of it."""

import pytest

from fedfora.registry import counted
from fedfora.reporting.wording import describe, score_lines


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            {"event": "rejected", "round": 2, "site": "a", "reason": "NaN"},
            "round 2: without a: NaN",
        ),
        ({"event": "absent", "site": "a", "reason": "late"}, "a takes no part: late"),
        ({"event": "joined", "round": 3, "site": "b"}, "round 3: b joins"),
        ({"event": "resumed", "after_round": 4}, "resumed after round 4"),
        ({"event": "lost", "round": 5, "reason": "shares"}, "round 5: lost: shares"),
        ({"event": "stopped_early", "best_round": 6}, "no better round since round 6: stopped"),
        ({"event": "validation", "step": 7, "loss": 1.5}, "step 7: validation loss 1.5000"),
        ({"event": "step", "step": 7, "loss": 1.5}, "step 7         training loss 1.500"),
        ({"event": "round", "round": 1}, "round 1"),
        (
            {"event": "round", "round": 1, "sites": [1, 2], "loss": 2.0, "validation_loss": 1.0},
            "round 1        2 sites   training loss 2.000   validation loss 1.000",
        ),
        (
            {"event": "round", "round": 1, "scores": {"rougeL": 0.5, "chrf": 30.0}, "epsilon": 2.0},
            "round 1        ROUGE-L 0.500   chrF (0 to 100) 30.000   epsilon 2.000",
        ),
        ({"event": "other"}, None),
    ],
)
def test_an_event_in_a_line(event, line):
    assert describe(event) == line


def test_the_number_of_rounds_stands_beside_the_round():
    assert describe({"event": "round", "round": 1}, total=3) == "round 1/3"


# Scores as lines: the usual ones first, and none left out.


SCORES = {
    "rows": 4,
    "length_ratio": 1.25,  # nobody told the table of this one
    "f1": 0.5,
    "precision": 0.25,
    "intervals": {"f1": [0.125, 0.75]},
    "relations": {"dose": {"f1": 1.0, "expected": 3}},
}


def test_every_score_has_a_line_and_the_usual_ones_come_first():
    lines = score_lines(SCORES)
    assert [line.split("  ")[0].strip() for line in lines[:4]] == [
        *("rows", "precision", "F1", "length ratio"),
    ]
    assert lines[2].endswith("0.500  [0.125, 0.750]")
    assert "F1 of dose" in lines[4]
    assert lines[4].endswith("of 3 expected")


def test_rows_without_references_say_so():
    assert score_lines({}) == ["no references, so no scores"]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (2400, "2,400 rows")]
)
def test_one_of_a_kind_has_no_s(number, text):
    assert counted(number, "row") == text


def test_a_round_of_one_site_is_told_in_the_singular():
    assert (
        describe({"event": "round", "round": 1, "sites": [{}]}).split("  ")[-1].strip() == "1 site"
    )
