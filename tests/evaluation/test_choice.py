"""Which option a text names, by hand and by law."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfora.data.encoding import PromptFormat
from fedfora.data.loading import Example
from fedfora.evaluation.evaluate import evaluate
from fedfora.evaluation.scores import kind_of, score
from fedfora.metrics import Answer
from fedfora.metrics.choice import parse_choice

LETTERS = ("A", "B", "C", "D")
TEXTS = ("aspirin", "warfarin", "heparin", "insulin")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        (" B. warfarin", 1),
        ("(C)", 2),
        ("D) because", 3),
        ("The answer is C.", 2),
        ("the correct option: b", 1),
        ("答案：D", 3),
        ("答案是B，因为", 1),
        ("选C", 2),
        ("B选项正确", 1),
        ("I would say it is D here", 3),
        ("A patient should rest", None),
        ("B or C", None),
        ("", None),
        ("none of them", None),
        ("Because", None),
        ("E", None),
    ],
)
def test_letters(text, index):
    assert parse_choice(text, LETTERS) == index


def test_only_single_letters_look_like_multiple_choice():
    assert kind_of(["A", " C\n"]) == "choice"
    for other in ("AB", "BCD", "", "a"):
        assert kind_of(["A", other]) == "text"


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("warfarin", 1),
        ("One gives heparin first", 2),
        ("C", 2),
        ("aspirin or insulin", None),
        ("paracetamol", None),
        ("Warfarin.", 1),
        ("none, heparinoids perhaps", None),
    ],
)
def test_texts(text, index):
    assert parse_choice(text, TEXTS) == index


@pytest.mark.parametrize(
    ("text", "index"),
    [("No", 1), ("yes.", 0), ("NO!", 1), ("Maybe, they say", 2), ("nobody knows", None)],
)
def test_words_are_named_in_any_case_and_only_as_words(text, index):
    assert parse_choice(text, ("yes", "no", "maybe")) == index


@given(st.lists(st.text("abcdefgh", min_size=2, max_size=9), min_size=2, max_size=6, unique=True))
def test_every_option_names_itself(options):
    assert [parse_choice(option, options) for option in options] == list(range(len(options)))


def test_scores_by_hand():
    """Written: right, wrong, none. Likeliest: wrong, right, right."""
    rows = [
        Answer("A", "A", options=LETTERS, likeliest=1),
        Answer("A", "B", options=LETTERS, likeliest=1),
        Answer("who knows", "C", options=LETTERS, likeliest=2),
    ]
    scores = score(rows, "choice").summary
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["likelihood_accuracy"] == pytest.approx(2 / 3)
    assert scores["parsed_share"] == pytest.approx(2 / 3)


def test_without_options_the_references_are_the_options():
    scores = score([Answer("positive", "positive"), Answer("so negative", "negative")], "choice")
    assert scores.summary["accuracy"] == 1


def test_a_site_is_judged_by_each_rows_own_options(monkeypatch):
    """A site whose rows all have the same answer must not make every mention of it right."""
    said = iter(["yes", "no, not yes"])
    monkeypatch.setattr("fedfora.evaluation.evaluate.encode_prompt", lambda *_: [1])
    monkeypatch.setattr("fedfora.evaluation.evaluate.generate", lambda *_, **__: list(said))
    columns = {"options": ["yes", "no"]}
    examples = [Example("Does it?", "", answer, columns) for answer in ("no", "yes")]
    prompts = PromptFormat("plain", "", 8, 8)
    result = evaluate(None, None, examples, prompts, batch_size=2)
    assert result.scores_of([1])["accuracy"] == 0
