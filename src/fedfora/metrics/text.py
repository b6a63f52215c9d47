"""Scores of free text against a reference: exact match, token F1, ROUGE, BLEU, chrF.

ROUGE is rouge-score's with a tokenizer that knows all scripts, BLEU and chrF are sacrebleu's; these
two packages are the extra `evaluation`.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

from fedfora.metrics.metric import Answer, metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@metric("token_f1", "text", label="token F1", headline=1, tabled=True)
def token_f1(answer: Answer) -> tuple[float, int]:
    """Return the F1 of the bags of tokens, as SQuAD does (https://arxiv.org/abs/1606.05250, 6.1).

    English articles and punctuation do not count. Scripts without spaces are compared by character,
    as CMRC 2018 does (https://arxiv.org/abs/1810.07366).
    """
    predicted, expected = (
        tokens(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)))
        for text in (answer.prediction, answer.reference)
    )
    if not predicted or not expected:
        return float(predicted == expected), 1
    hits = (Counter(predicted) & Counter(expected)).total()
    return 2 * hits / (len(predicted) + len(expected)), 1


@metric("rouge1", "text", package="rouge_score", label="ROUGE-1")
def rouge1(answer: Answer) -> tuple[float, int]:
    """Return the F1 of single tokens (Lin 2004, https://aclanthology.org/W04-1013, Sec. 2)."""
    return _rouge("rouge1", answer)


@metric("rouge2", "text", package="rouge_score", label="ROUGE-2")
def rouge2(answer: Answer) -> tuple[float, int]:
    """Return the F1 of pairs of tokens (Lin 2004, https://aclanthology.org/W04-1013, Sec. 2)."""
    return _rouge("rouge2", answer)


@metric("rougeL", "text", package="rouge_score", label="ROUGE-L", headline=0, tabled=True)
def rouge_l(answer: Answer) -> tuple[float, int]:
    """Return the F1 of the longest common subsequence (Lin 2004, Sec. 3.1)."""
    return _rouge("rougeL", answer)


def _sacrebleu_of(sums: Sequence[float], name: str) -> float:
    return float(_scorer(name)._compute_score_from_stats([int(n) for n in sums]).score)


@metric(
    "bleu",
    "text",
    total=partial(_sacrebleu_of, name="BLEU"),
    package="sacrebleu",
    label="BLEU (0 to 100)",
    tabled=True,
)
def bleu(answer: Answer) -> Sequence[float]:
    """Return lengths and n-gram matches of the row (Post 2018, https://aclanthology.org/W18-6319).

    The score is the corpus BLEU, 0 to 100, with sacrebleu's tokenizer `zh` for rows whose reference
    has Han characters and `13a` for others.
    """
    tokenizer = "zh" if _HAN_OR_KANA.search(answer.reference) else "13a"
    return _statistics(_scorer("BLEU", tokenize=tokenizer), answer)


@metric(
    "chrf",
    "text",
    total=partial(_sacrebleu_of, name="CHRF"),
    row="chrf",
    package="sacrebleu",
    label="chrF (0 to 100)",
    headline=0,
    tabled=True,
)
def chrf(answer: Answer) -> Sequence[float]:
    """Return the row's character n-gram matches (Popovic 2015, https://aclanthology.org/W15-3049).

    The score is the corpus chrF2, 0 to 100, with sacrebleu's defaults.
    """
    return _statistics(_scorer("CHRF"), answer)


@metric("exact_match", "triples", "text", "choice", headline=2, tabled="text")
def exact_match(answer: Answer) -> tuple[int, int]:
    """Return whether the prediction is the reference, but for space around it."""
    return int(answer.prediction.strip() == answer.reference.strip()), 1


def _statistics(scorer: Any, answer: Answer) -> Sequence[float]:
    # sacrebleu's public functions give scores only, and those of rows cannot be added up.
    (row,) = scorer._extract_corpus_statistics([answer.prediction], [[answer.reference]])
    return [float(number) for number in row]


def _rouge(name: str, answer: Answer) -> tuple[float, int]:
    score = _rouge_scorer(name).score(answer.reference, answer.prediction)[name]
    return float(score.fmeasure), 1


@lru_cache
def _rouge_scorer(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], tokenizer=SimpleNamespace(tokenize=tokens))


@lru_cache
def _scorer(name: str, **options: str) -> Any:
    from sacrebleu import metrics

    return getattr(metrics, name)(**options)


# Text to the tokens that ROUGE and token F1 compare: words, and characters where none are spaced.
# rouge-score's own tokenizer keeps a-z and 0-9 and silently drops everything else, all of Chinese
# included: two different Chinese texts would score 0, and so would two equal ones.


# Scripts written without spaces between words: Han, kana, Thai, Lao, Khmer, Burmese.
UNSPACED = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
    "\u3005-\u3007\u3040-\u30ff\u0e00-\u0eff\u1780-\u17ff\u1000-\u109f"
)
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_HAN_OR_KANA = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff]")


def tokens(text: str) -> list[str]:
    """Return lower-case words; each character on its own if a script has no spaces.

    On ASCII text these are the tokens of rouge-score without stemming.
    """
    return _TOKEN.findall(text.lower())
