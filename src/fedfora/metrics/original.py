"""The original program's own scores, as it computed them, so that its numbers can be compared.

Their faults are part of them. For triples: the sum over rows of F1 is divided by a literal 50, so
the score grows with the file and exceeds 1 for a perfect model on more than 50 rows; the model's
output is compared together with the prompt, so that each line of the prompt counts as a predicted
answer that can never be right, and precision stays below 1; lines are compared as they are, without
being parsed, so one space or a broken line decides. For medical answers: texts are compared as sets
of single characters, so the order of words, and whether a word stands there at all, hardly matters.
"""

from fedfora.metrics.metric import Answer, metric

ROWS_ASSUMED = 50


@metric(
    "original_f1",
    "triples",
    total=lambda sums: sums[0] / ROWS_ASSUMED,
    label="F1 as the original code counts it",
)
def original_f1(answer: Answer) -> tuple[float]:
    """Return the F1 of the sets of lines; the prompt's lines are among the predicted ones."""
    predicted = set((answer.prompt + "\n" + answer.prediction).split("\n"))
    return (_set_f1(predicted, set(answer.reference.split("\n"))),)


@metric("original_character_f1", "text", row=None, label="character F1 of the original")
def original_character_f1(answer: Answer) -> tuple[float, int]:
    """Return the F1 of the sets of characters."""
    return _set_f1(set(answer.prediction), set(answer.reference)), 1


def _set_f1(predicted: set[str], expected: set[str]) -> float:
    hits = len(predicted & expected)
    if not hits:
        return 0.0
    precision, recall = hits / len(predicted), hits / len(expected)
    return 2 * precision * recall / (precision + recall)
