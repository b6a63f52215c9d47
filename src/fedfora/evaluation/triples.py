"""Scores of extracted triples: precision, recall, F1, and how much of the text parsed.

A triple is a line `head_relation_tail`, the target format of the extraction task. A triple that
stands twice in a row counts once, on either side. Micro scores count the triples of all rows
together, macro scores are means over rows of each row's own score (the two averages of Manning et
al. 2008, Introduction to Information Retrieval, Sec. 13.6, with rows for classes).
"""

from collections.abc import Sequence

from fedfora.evaluation.metrics import Answer, mean, metric

Triple = tuple[str, str, str]


def parse_triples(text: str) -> tuple[list[Triple], int]:
    """Return the triples of a text and the number of non-empty lines that are none.

    A line is a triple when underscores split it into exactly three non-empty parts.
    """
    triples: list[Triple] = []
    unparsed = 0
    for line in text.strip().split("\n"):
        parts = tuple(part.strip() for part in line.split("_"))
        if len(parts) == 3 and all(parts):
            triples.append((parts[0], parts[1], parts[2]))
        elif line.strip():
            unparsed += 1
    return triples, unparsed


def are_triples(texts: Sequence[str]) -> bool:
    """Say whether every text consists of triples only."""
    return all(triples and not unparsed for triples, unparsed in map(parse_triples, texts))


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


@metric("precision", "triples", total=precision)
@metric("recall", "triples", total=recall)
@metric("f1", "triples", total=f1)
def triple_counts(answer: Answer) -> tuple[int, int, int]:
    """Return how many triples are right, predicted and expected."""
    return _compared(*_both(answer))


@metric("macro_precision", "triples", total=mean, row="precision")
def macro_precision(answer: Answer) -> tuple[float, int]:
    """Return the row's precision; 1 where nothing was expected and nothing predicted."""
    counts = triple_counts(answer)
    return precision(counts) if any(counts) else 1.0, 1


@metric("macro_recall", "triples", total=mean, row="recall")
def macro_recall(answer: Answer) -> tuple[float, int]:
    """Return the row's recall; 1 where nothing was expected and nothing predicted."""
    counts = triple_counts(answer)
    return recall(counts) if any(counts) else 1.0, 1


@metric("macro_f1", "triples", total=mean, row="f1")
def macro_f1(answer: Answer) -> tuple[float, int]:
    """Return the row's F1; 1 where nothing was expected and nothing predicted."""
    counts = triple_counts(answer)
    return f1(counts) if any(counts) else 1.0, 1


@metric("parse_rate", "triples", total=mean, row="parsed")
def parse_rate(answer: Answer) -> tuple[int, int]:
    """Return whether every predicted line is a triple."""
    return int(not parse_triples(answer.prediction)[1]), 1


def relation_scores(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and number of expected triples for each expected relation."""
    rows = [_both(answer) for answer in answers]
    relations = sorted({relation for _, expected in rows for _, relation, _ in expected})
    scores = {}
    for name in relations:
        counts = [_compared(_only(p, name), _only(e, name)) for p, e in rows]
        sums = [sum(column) for column in zip(*counts, strict=True)]
        scores[name] = {
            "precision": precision(sums),
            "recall": recall(sums),
            "f1": f1(sums),
            "expected": sums[2],
        }
    return scores


def _both(answer: Answer) -> tuple[set[Triple], set[Triple]]:
    return set(parse_triples(answer.prediction)[0]), set(parse_triples(answer.reference)[0])


def _compared(predicted: set[Triple], expected: set[Triple]) -> tuple[int, int, int]:
    return len(predicted & expected), len(predicted), len(expected)


def _only(triples: set[Triple], relation: str) -> set[Triple]:
    return {triple for triple in triples if triple[1] == relation}
