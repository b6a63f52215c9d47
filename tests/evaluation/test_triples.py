"""Triple scores by hand, and the laws that any such score obeys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfora.evaluation.scores import kind_of, score
from fedfora.metrics import Answer
from fedfora.metrics.triples import are_triples, parse_triples


def scores_of(predictions, references):
    rows = [Answer(p, r) for p, r in zip(predictions, references, strict=True)]
    return score(rows, "triples").summary


def test_by_hand():
    """Row 1: one of two right, one wrong. Row 2: nothing of one. So 1 hit, 2 said, 3 true."""
    scores = scores_of(["a_r_b\na_r_x", ""], ["a_r_b\nc_s_d", "e_s_f"])
    assert scores["precision"] == pytest.approx(1 / 2)
    assert scores["recall"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx(2 * 1 / (2 + 3))
    assert scores["macro_f1"] == pytest.approx((0.5 + 0.0) / 2)
    assert scores["macro_precision"] == pytest.approx((0.5 + 0.0) / 2)
    assert scores["relations"]["r"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "folded_f1": pytest.approx(2 / 3),
        "lenient_f1": pytest.approx(2 / 3),
        "expected": 1,
    }
    assert scores["relations"]["s"]["f1"] == 0
    assert scores["relations"]["s"]["expected"] == 2


def test_a_triple_said_twice_counts_once():
    scores = scores_of(["a_r_b\na_r_b\na_r_b"], ["a_r_b"])
    assert scores["precision"] == scores["f1"] == 1
    assert scores_of(["a_r_b"], ["a_r_b\na_r_b"])["recall"] == 1


@pytest.mark.parametrize(
    ("text", "triples", "unparsed"),
    [
        ("a_r_b", [("a", "r", "b")], 0),
        (" a _ r _ b \n\n", [("a", "r", "b")], 0),
        ("a_r\nfoo", [], 2),
        ("a_r_b_c", [], 1),
        ("a__b", [], 1),
        (
            r"p\_53_adverse effect_low\_grade rash",
            [("p_53", "adverse effect", "low_grade rash")],
            0,
        ),
        (
            "a_adverse effect_b\nc_dose_5 mg",
            [("a", "adverse effect", "b"), ("c", "dose", "5 mg")],
            0,
        ),
        ("", [], 0),
    ],
)
def test_parsing(text, triples, unparsed):
    assert parse_triples(text) == (triples, unparsed)


def test_parse_rate_is_the_share_of_rows_without_a_broken_line():
    scores = scores_of(["a_r_b", "a_r_b\nfoo", ""], ["a_r_b"] * 3)
    assert scores["parse_rate"] == pytest.approx(2 / 3)


def test_are_triples():
    assert are_triples(["a_b_c", "a_b_c\nd_e_f"])
    assert not are_triples(["a_b_c", "some text"])
    assert are_triples(["a_b_c", ""])  # a sentence without triples
    assert not are_triples(["", ""])


triple = st.tuples(*[st.sampled_from("abc")] * 3).map("_".join)
answer = st.lists(triple, min_size=1, max_size=4).map("\n".join)


@given(st.lists(answer, min_size=1, max_size=5))
def test_the_truth_scores_one(references):
    scores = scores_of(references, references)
    assert scores["f1"] == scores["macro_f1"] == scores["parse_rate"] == 1
    assert {relation["f1"] for relation in scores["relations"].values()} == {1.0}


@given(st.lists(st.tuples(answer, answer), min_size=1, max_size=5))
def test_swapping_sides_swaps_precision_and_recall(rows):
    predictions, references = zip(*rows, strict=True)
    one, other = scores_of(predictions, references), scores_of(references, predictions)
    for prefix in ("", "macro_"):
        assert one[f"{prefix}precision"] == pytest.approx(other[f"{prefix}recall"])
        assert one[f"{prefix}f1"] == pytest.approx(other[f"{prefix}f1"])


@given(st.lists(st.tuples(answer, answer), min_size=1, max_size=5))
def test_relations_add_up_to_the_expected_triples(rows):
    predictions, references = zip(*rows, strict=True)
    scores = scores_of(predictions, references)
    expected = sum(len(set(text.split("\n"))) for text in references)
    assert sum(relation["expected"] for relation in scores["relations"].values()) == expected


@pytest.mark.parametrize(
    ("predicted", "expected", "strict", "folded", "lenient"),
    [
        ("d_adverse effect_Rash", "d_adverse effect_rash", 0, 1, 1),
        ("D_adverse  effect_skin   rash", "d_adverse effect_skin rash", 0, 1, 1),
        ("d_adverse effect_skin rash", "d_adverse effect_rash", 0, 0, 1),
        ("d_adverse effect_acute skin rash", "d_adverse effect_sudden skin reaction", 0, 0, 0),
        ("d_dose_rash", "d_adverse effect_rash", 0, 0, 0),
        ("x_adverse effect_rash", "d_adverse effect_rash", 0, 0, 0),
        ("d_adverse effect_5 %", "d_adverse effect_!", 0, 0, 0),
        ("d_r_rash\nd_r_skin rash", "d_r_rash", 2 / 3, 2 / 3, 2 / 3),  # one to one
        ("d_r_a b\nd_r_a", "d_r_a\nd_r_b", 1 / 2, 1 / 2, 1),  # the largest matching
        ("发动机_部件故障_水温高", "发动机_部件故障_水温过高", 0, 0, 1),
    ],
)
def test_strict_folded_and_lenient(predicted, expected, strict, folded, lenient):
    scores = scores_of([predicted], [expected])
    names = ("f1", "folded_f1", "lenient_f1")
    assert [scores[name] for name in names] == pytest.approx([strict, folded, lenient])
    relation = next(iter(scores["relations"].values()))
    assert relation["f1"] == pytest.approx(strict)


part = st.sampled_from(["a", "A", "b", "a b", "b  A", "c"])
loose = st.lists(st.tuples(part, part, part).map("_".join), max_size=5).map("\n".join)


@given(st.lists(st.tuples(loose, loose), min_size=1, max_size=4))
def test_a_looser_score_is_never_lower(rows):
    predictions, references = zip(*rows, strict=True)
    for of in (scores := scores_of(predictions, references), *scores["relations"].values()):
        assert of["f1"] <= of["folded_f1"] <= of["lenient_f1"] <= 1


def test_a_file_in_which_some_sentences_have_no_triple_is_one_of_triples():
    assert kind_of(["d_adverse effect_rash", ""]) == "triples"
    scores = scores_of(["d_adverse effect_rash", "d_r_x"], ["d_adverse effect_rash", ""])
    assert scores["precision"] == scores["recall"] / 2 == 1 / 2
