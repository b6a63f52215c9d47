r"""Scores of extracted triples: precision, recall, F1, and how much of the text parsed.

A triple is a line `head_relation_tail`, the target format of the extraction task; an underscore
inside a word is written `\_`. A triple that stands twice in a row counts once, on either side. F1
comes in three strictnesses, the first of which judges: every character right; case and space
folded; head and relation right (folded) while at least half the words of the shorter tail are
shared. A loose hit is one-to-one, so that looser is never lower. Micro scores count the triples of
all rows together, macro scores are means over rows of each row's own score (the two averages of
Manning et al. 2008, Introduction to Information Retrieval, Sec. 13.6, with rows for classes).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from fedfora.metrics.metric import Answer, mean, metric
from fedfora.metrics.text import tokens

Triple = tuple[str, str, str]
_BETWEEN = re.compile(r"(?<!\\)_")


def parse_triples(text: str) -> tuple[list[Triple], int]:
    """Return the triples of a text and the number of non-empty lines that are not triples.

    A line is a triple when underscores without a backslash split it into three non-empty parts.
    """
    triples: list[Triple] = []
    unparsed = 0
    for line in text.strip().split("\n"):
        parts = tuple(part.replace(r"\_", "_").strip() for part in _BETWEEN.split(line))
        if len(parts) == 3 and all(parts):
            triples.append((parts[0], parts[1], parts[2]))
        elif line.strip():
            unparsed += 1
    return triples, unparsed


def are_triples(texts: Sequence[str]) -> bool:
    """Say whether every text consists of triples only, but for those that are empty."""
    parsed = [parse_triples(text) for text in texts]
    return any(triples for triples, _ in parsed) and not any(unparsed for _, unparsed in parsed)


def precision(sums: Sequence[float]) -> float:
    """Return the share of what was predicted that is right; 0 where nothing was predicted."""
    hits, num_predicted, _ = sums
    return hits / num_predicted if num_predicted else 0.0


def recall(sums: Sequence[float]) -> float:
    """Return the share of what was expected that was found; 0 where nothing was expected."""
    hits, _, num_expected = sums
    return hits / num_expected if num_expected else 0.0


def f1(sums: Sequence[float]) -> float:
    """Return the harmonic mean of precision and recall; 0 without any triple."""
    hits, num_predicted, num_expected = sums
    total = num_predicted + num_expected
    return 2 * hits / total if total else 0.0


@metric("f1", "triples", total=f1, label="F1", headline=0, tabled=True)
@metric("recall", "triples", total=recall, tabled=True)
@metric("precision", "triples", total=precision, tabled=True)
def triple_counts(answer: Answer) -> tuple[int, int, int]:
    """Return how many triples are right, predicted and expected."""
    return _compared(*_both(answer))


@metric("folded_f1", "triples", total=f1, label="F1, case and space folded")
def folded_counts(answer: Answer) -> tuple[int, int, int]:
    """Return the counts where case and space do not matter."""
    return _matched_folded(*_both(answer))


@metric("lenient_f1", "triples", total=f1, label="F1, lenient (tails overlap)")
def lenient_counts(answer: Answer) -> tuple[int, int, int]:
    """Return the counts where head and relation are right and the tails overlap."""
    return _matched_leniently(*_both(answer))


def _of_a_row(total: Callable[[Sequence[float]], float]) -> Callable[[Answer], tuple[float, int]]:
    """Return what scores a row by itself; 1 where nothing was expected and nothing predicted."""

    def scored(answer: Answer) -> tuple[float, int]:
        counts = triple_counts(answer)
        return total(counts) if any(counts) else 1.0, 1

    return scored


for _name, _total in (("precision", precision), ("recall", recall), ("f1", f1)):
    _label = f"{_name.replace('f1', 'F1')}, mean over rows"
    metric(f"macro_{_name}", "triples", total=mean, row=_name, label=_label)(_of_a_row(_total))


@metric("parse_rate", "triples", row="parsed", tabled=True)
def parse_rate(answer: Answer) -> tuple[int, int]:
    """Return whether every predicted line is a triple."""
    return int(not parse_triples(answer.prediction)[1]), 1


def relation_scores(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and number of expected triples for each expected relation."""
    rows = [_both(answer) for answer in answers]
    relations = sorted({relation for _, expected in rows for _, relation, _ in expected})
    scores = {}
    for name in relations:
        pairs = [[{triple for triple in side if triple[1] == name} for side in row] for row in rows]
        exact, folded, lenient = (
            [sum(column) for column in zip(*(count(*pair) for pair in pairs), strict=True)]
            for count in (_compared, _matched_folded, _matched_leniently)
        )
        scores[name] = {
            "precision": precision(exact),
            "recall": recall(exact),
            "f1": f1(exact),
            "folded_f1": f1(folded),
            "lenient_f1": f1(lenient),
            "expected": exact[2],
        }
    return scores


def _both(answer: Answer) -> tuple[set[Triple], set[Triple]]:
    return set(parse_triples(answer.prediction)[0]), set(parse_triples(answer.reference)[0])


def _compared(predicted: set[Triple], expected: set[Triple]) -> tuple[int, int, int]:
    return len(predicted & expected), len(predicted), len(expected)


def _matched(
    predicted: set[Triple], expected: set[Triple], alike: Callable[[Triple, Triple], bool]
) -> tuple[int, int, int]:
    """Return the size of the largest one-to-one matching of alike triples, and of both sides."""
    edges = {e: [p for p in sorted(predicted) if alike(p, e)] for e in sorted(expected)}
    partners: dict[Triple, Triple] = {}

    def augment(wanted: Triple, seen: set[Triple]) -> bool:
        for candidate in edges[wanted]:
            if candidate not in seen:
                seen.add(candidate)
                if candidate not in partners or augment(partners[candidate], seen):
                    partners[candidate] = wanted
                    return True
        return False

    hits = sum(augment(triple, set()) for triple in edges)
    return hits, len(predicted), len(expected)


def _overlapping(one: Triple, other: Triple) -> bool:
    (*ours, tail), (*theirs, other_tail) = _folded(one), _folded(other)
    words, other_words = Counter(tokens(tail)), Counter(tokens(other_tail))
    shared, shorter = (words & other_words).total(), min(words.total(), other_words.total())
    return ours == theirs and (tail == other_tail or 0 < shorter <= 2 * shared)


def _folded(triple: Triple) -> list[str]:
    return [" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in triple]


_matched_folded = partial(_matched, alike=lambda one, other: _folded(one) == _folded(other))
_matched_leniently = partial(_matched, alike=_overlapping)
