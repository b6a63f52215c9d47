"""Scores as lines: the usual ones first, and none left out."""

from fedfora.reporting.table import score_lines

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
