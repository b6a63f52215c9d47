"""The original's rule, against a plain retelling of it, and its faults as they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfora.evaluation.scores import score
from fedfora.metrics import Answer

line = st.text("ab_", max_size=4)
text = st.lists(line, min_size=1, max_size=3).map("\n".join)


def retold(rows):
    """Sum of row F1s over sets of lines, the prompt among the predicted ones, over fifty."""
    total = 0.0
    for prompt, prediction, reference in rows:
        said = []
        for whole in (prompt, prediction):
            said += whole.split("\n")
        right = [line for line in set(said) if line in reference.split("\n")]
        p = len(right) / len(set(said))
        r = len(right) / len(set(reference.split("\n")))
        total += 2 * p * r / (p + r) if p + r else 0
    return total / 50


@given(st.lists(st.tuples(text, text, text), min_size=1, max_size=4))
def test_it_is_the_originals_rule(rows):
    answers = [Answer(prediction, reference, prompt) for prompt, prediction, reference in rows]
    assert score(answers, "triples", original=True).summary["original_f1"] == pytest.approx(
        retold(rows)
    )


def test_a_perfect_answer_misses_half_because_the_prompt_counts():
    """One right line and the prompt's line: P = 1/2, R = 1, F1 = 2/3."""
    scores = score([Answer("a_r_b", "a_r_b", "Extract:")] * 50, "triples", original=True).summary
    assert scores["original_f1"] == pytest.approx(2 / 3)
    assert scores["f1"] == 1


def test_more_than_fifty_rows_exceed_one():
    rows = [Answer("a_r_b", "a_r_b", "Extract:")] * 150
    assert score(rows, "triples", original=True).summary["original_f1"] == pytest.approx(2.0)


def test_the_order_of_characters_does_not_matter_to_the_original():
    summary = score([Answer("不可服药", "可不服药")], "text", original=True).summary
    assert summary["original_character_f1"] == 1
    assert summary["rouge2"] < 1


@pytest.mark.parametrize("kind", ["triples", "text"])
def test_nobody_sees_the_original_scores_who_does_not_ask(kind):
    summary = score([Answer("a_r_b", "a_r_b")], kind).summary
    assert not [name for name in summary if name.startswith("original")]
    assert not [name for name in summary["intervals"] if name.startswith("original")]
