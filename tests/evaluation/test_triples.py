"""Scores by hand, and the laws that any such score obeys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfora.evaluation.triples import are_triples, parse_triples, score_triples


def test_by_hand():
    """Row 1: one of two right, one wrong. Row 2: nothing of one. So 1 hit, 2 said, 3 true."""
    scores = score_triples(["a_r_b\na_r_x", ""], ["a_r_b\nc_s_d", "e_s_f"])
    assert scores.micro.precision == pytest.approx(1 / 2)
    assert scores.micro.recall == pytest.approx(1 / 3)
    assert scores.micro.f1 == pytest.approx(2 * 1 / (2 + 3))
    assert scores.macro.f1 == pytest.approx((0.5 + 0.0) / 2)
    assert scores.per_relation["r"].f1 == pytest.approx(2 / 3)
    assert scores.per_relation["s"].f1 == 0


def test_a_triple_said_twice_counts_once():
    scores = score_triples(["a_r_b\na_r_b\na_r_b"], ["a_r_b"])
    assert scores.micro.precision == scores.micro.f1 == 1


@pytest.mark.parametrize(
    ("text", "triples", "unparsed"),
    [
        ("a_r_b", [("a", "r", "b")], 0),
        (" a _ r _ b \n\n", [("a", "r", "b")], 0),
        ("a_r\nfoo", [], 2),
        ("a_r_b_c", [], 1),
        ("a__b", [], 1),
        ("", [], 0),
    ],
)
def test_parsing(text, triples, unparsed):
    assert parse_triples(text) == (triples, unparsed)


def test_parse_rate_is_the_share_of_rows_without_a_broken_line():
    assert score_triples(["a_r_b", "a_r_b\nfoo", ""], ["a_r_b"] * 3).parse_rate == pytest.approx(
        2 / 3
    )


def test_are_triples():
    assert are_triples(["a_b_c", "a_b_c\nd_e_f"])
    assert not are_triples(["a_b_c", "some text"])
    assert not are_triples([""])


triple = st.tuples(*[st.sampled_from("abc")] * 3).map("_".join)
answer = st.lists(triple, min_size=1, max_size=4).map("\n".join)


@given(st.lists(answer, min_size=1, max_size=5))
def test_the_truth_scores_one(references):
    scores = score_triples(references, references)
    assert scores.micro.f1 == scores.macro.f1 == scores.parse_rate == 1


@given(st.lists(st.tuples(answer, answer), min_size=1, max_size=5))
def test_swapping_sides_swaps_precision_and_recall(rows):
    predictions, references = zip(*rows, strict=True)
    one, other = score_triples(predictions, references), score_triples(references, predictions)
    assert one.micro.precision == pytest.approx(other.micro.recall)
    assert one.micro.f1 == pytest.approx(other.micro.f1)


@given(st.lists(st.tuples(answer, answer), min_size=2, max_size=5))
def test_the_order_of_rows_does_not_matter(rows):
    one = score_triples(*zip(*rows, strict=True))
    other = score_triples(*zip(*rows[::-1], strict=True))
    assert one.micro == other.micro
    assert one.macro.f1 == pytest.approx(other.macro.f1)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score_triples(["a"], ["a", "b"])
