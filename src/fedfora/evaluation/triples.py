"""Scores of extracted triples: precision, recall, F1, and how much of the text parsed.

A triple is a line `head_relation_tail`, the target format of the extraction task. Pure functions of
text. A triple that stands twice in a row counts once, on either side.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

Triple = tuple[str, str, str]


@dataclass(frozen=True)
class Score:
    """Precision, recall and F1, each in [0, 1]; 0 where nothing was predicted or expected."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class TripleScores:
    """Scores of a set of rows.

    Args:
        micro: All triples of all rows counted together.
        macro: Mean over rows of each row's score; a row with nothing expected and nothing predicted
            scores 1.
        per_relation: Micro scores of the triples of each relation.
        parse_rate: Share of rows whose every predicted line is a triple.
        rows: Number of rows.
    """

    micro: Score
    macro: Score
    per_relation: dict[str, Score]
    parse_rate: float
    rows: int

    def as_dict(self) -> dict[str, object]:
        """Return the scores as JSON holds them."""
        return asdict(self)


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


def score_triples(predictions: Sequence[str], references: Sequence[str]) -> TripleScores:
    """Score predicted texts against reference texts, row by row.

    Raises:
        ValueError: If the two have different lengths or are empty.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    parsed = [parse_triples(text) for text in predictions]
    predicted = [set(triples) for triples, _ in parsed]
    expected = [set(parse_triples(text)[0]) for text in references]
    relations = sorted({relation for row in expected for _, relation, _ in row})
    return TripleScores(
        micro=_micro(predicted, expected),
        macro=_macro(predicted, expected),
        per_relation={
            name: _micro(_only(predicted, name), _only(expected, name)) for name in relations
        },
        parse_rate=sum(not unparsed for _, unparsed in parsed) / len(parsed),
        rows=len(parsed),
    )


def _only(rows: list[set[Triple]], relation: str) -> list[set[Triple]]:
    return [{triple for triple in row if triple[1] == relation} for row in rows]


def _micro(predicted: list[set[Triple]], expected: list[set[Triple]]) -> Score:
    hits = sum(len(p & e) for p, e in zip(predicted, expected, strict=True))
    return _score(hits, sum(map(len, predicted)), sum(map(len, expected)))


def _macro(predicted: list[set[Triple]], expected: list[set[Triple]]) -> Score:
    scores = [
        _score(len(p & e), len(p), len(e)) if p or e else Score(1.0, 1.0, 1.0)
        for p, e in zip(predicted, expected, strict=True)
    ]
    n = len(scores)
    return Score(
        sum(s.precision for s in scores) / n,
        sum(s.recall for s in scores) / n,
        sum(s.f1 for s in scores) / n,
    )


def _score(hits: int, num_predicted: int, num_expected: int) -> Score:
    total = num_predicted + num_expected
    return Score(
        hits / num_predicted if num_predicted else 0.0,
        hits / num_expected if num_expected else 0.0,
        2 * hits / total if total else 0.0,
    )
