"""Text scores against the libraries' own and against hand values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfora.evaluation.scores import score
from fedfora.metrics import METRICS, Answer
from fedfora.metrics.text import token_f1, tokens

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs rouge-score")
sacrebleu = pytest.importorskip("sacrebleu", reason="needs sacrebleu")

ENGLISH = [
    ("The patient has a fever.", "The patient had a high fever."),
    ("Take two tablets daily, please", "Take two tablets a day."),
    ("No idea at all", "It is a viral infection of the upper airways."),
]
CHINESE = [
    ("发动机水温过高，风扇转动。", "发动机水温高，风扇低速转动。"),
    ("更换节气门后故障排除", "更换节气门，故障排除。"),
    ("没有办法。", "检查ABS传感器的5V电压。"),
]


def summary(pairs):
    return score([Answer(p, r) for p, r in pairs], "text").summary


def test_rouge_scores_own_tokenizer_drops_chinese_and_ours_does_not():
    """The trap this guards: by default two equal Chinese texts score 0."""
    text = CHINESE[0][1]
    default = rouge_scorer.RougeScorer(["rouge1"]).score(text, text)["rouge1"].fmeasure
    assert default == 0
    assert summary([(text, text)])["rouge1"] == 1
    assert 0 < summary([CHINESE[0]])["rouge1"] < 1


def test_chinese_rouge_is_over_characters():
    """Predicted 甲乙丙, expected 甲丁丙: 2 of 3 characters, no pair, subsequence 甲丙."""
    scores = summary([("甲乙丙", "甲丁丙")])
    assert scores["rouge1"] == pytest.approx(2 / 3)
    assert scores["rouge2"] == 0
    assert scores["rougeL"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_english_rouge_is_the_librarys(name):
    scorer = rouge_scorer.RougeScorer([name])
    expected = [scorer.score(r, p)[name].fmeasure for p, r in ENGLISH]
    assert summary(ENGLISH)[name] == pytest.approx(sum(expected) / len(expected))


@given(st.text(st.characters(max_codepoint=127)))
def test_on_ascii_the_tokens_are_the_librarys(text):
    from rouge_score.tokenize import tokenize

    # rouge-score splits words at "_" too, as we do.
    assert tokens(text) == tokenize(text, None)


def test_tokens_of_mixed_text():
    assert tokens("检查ABS传感器 5V, naïve café_x") == [
        *("检", "查", "abs", "传", "感", "器", "5v", "naïve", "café", "x"),
    ]


@pytest.mark.parametrize(("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh")])
def test_bleu_is_sacrebleus(pairs, tokenizer):
    predictions, references = map(list, zip(*pairs, strict=True))
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score
    assert summary(pairs)["bleu"] == pytest.approx(expected)
    assert expected > 5


@pytest.mark.parametrize("pairs", [ENGLISH, CHINESE])
def test_chrf_is_sacrebleus(pairs):
    predictions, references = map(list, zip(*pairs, strict=True))
    expected = sacrebleu.corpus_chrf(predictions, [references]).score
    assert summary(pairs)["chrf"] == pytest.approx(expected)
    rows = score([Answer(p, r) for p, r in pairs], "text").rows
    first = sacrebleu.sentence_chrf(predictions[0], references[:1]).score
    assert rows[0]["chrf"] == pytest.approx(first)


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("the Cat!", "a cat", 1.0),
        ("cat sat", "the cat", 2 / 3),
        ("cat cat", "cat", 2 / 3),
        ("", "", 1.0),
        ("cat", "", 0.0),
        ("水温低", "水温高", 2 / 3),
    ],
)
def test_token_f1_by_hand(prediction, reference, f1):
    assert token_f1(Answer(prediction, reference)) == (pytest.approx(f1), 1)


def test_exact_match_ignores_space_around_only():
    counts = METRICS["exact_match"].counts
    assert counts(Answer(" a b\n", "a b")) == (1, 1)
    assert counts(Answer("a  b", "a b")) == (0, 1)
