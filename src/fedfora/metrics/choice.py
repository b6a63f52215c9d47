"""Scores of multiple choice: by the letter or option that was written, and by the likeliest option.

Both are in use and differ: letters written as in MMLU (Hendrycks et al. 2021,
https://arxiv.org/abs/2009.03300), likelihoods as in Brown et al. 2020
(https://arxiv.org/abs/2005.14165, Sec. 2.4). A written answer that names no option counts as wrong,
so the share that parsed stands beside.
"""

import re
import string
from collections.abc import Sequence

from fedfora.metrics.metric import Answer, metric

LETTERS = string.ascii_uppercase
_LEADING = re.compile(r"\(?([A-Z])\)?(?![A-Za-z' \t])")
_ANNOUNCED = re.compile(
    r"(?:answer|option|choice|答案|选项|选择?)\s*(?:is|are|为|是)?\s*[:：]?\s*\(?([A-Z])\)?(?![A-Za-z])",
    re.IGNORECASE,
)
_AS_WORD = "(?<![a-z0-9]){}(?![a-z0-9])"  # scripts without spaces have no such neighbors
_ALONE = re.compile(r"(?<![A-Za-z])([B-HJ-Z])(?![A-Za-z'])")  # A and I are words too


def letters_of(references: Sequence[str]) -> tuple[str, ...]:
    """Return the different references, sorted: the options of rows that have none."""
    return tuple(sorted({reference.strip() for reference in references}))


def are_letters(references: Sequence[str]) -> bool:
    """Return whether every reference is one capital letter, as in multiple choice."""
    return all(reference.strip() in set(LETTERS) for reference in references)


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """Return the index of the option that a text names; None if it names none, or several.

    In this order: the text is an option, "No." and "no" alike; it begins with a letter by itself;
    it announces a letter ("the answer is B", "答案：B"); exactly one letter of an option stands
    alone in it; exactly one option stands in it as a word. A letter is an option itself, or its
    place: A is the first.
    """
    stripped = text.strip()
    if stripped in options:
        return options.index(stripped)
    folded = [option.casefold() for option in options]
    if folded.count(whole := stripped.rstrip(".!。").casefold()) == 1:
        return folded.index(whole)
    lettered = all(len(option) == 1 and option in LETTERS for option in options)
    signs = options if lettered else LETTERS[: len(options)]
    letters = {letter: index for index, letter in enumerate(signs)}
    if (leading := _LEADING.match(stripped)) and leading[1] in letters:
        return letters[leading[1]]
    for announced in _ANNOUNCED.findall(text):
        if announced.upper() in letters:
            return letters[announced.upper()]
    if len(alone := set(_ALONE.findall(text)) & set(letters)) == 1:
        return letters[alone.pop()]
    contained = [
        index
        for index, option in enumerate(folded)
        if len(option) > 1 and re.search(_AS_WORD.format(re.escape(option)), text.casefold())
    ]
    return contained[0] if len(contained) == 1 else None


@metric("accuracy", "choice", row="correct", label="accuracy, as written", headline=0, tabled=True)
def accuracy(answer: Answer) -> tuple[int, int]:
    """Return whether the written answer names the right option."""
    right = parse_choice(answer.reference, answer.options)
    return int(right is not None and parse_choice(answer.prediction, answer.options) == right), 1


@metric(
    "likelihood_accuracy",
    "choice",
    row="likeliest_correct",
    label="accuracy, by likelihood",
    tabled=True,
)
def likelihood_accuracy(answer: Answer) -> tuple[int, int]:
    """Return whether the likeliest option is the right one; nothing if nobody asked."""
    if answer.likeliest is None:
        return 0, 0
    return int(answer.likeliest == parse_choice(answer.reference, answer.options)), 1


@metric("parsed_share", "choice", row="parsed", label="share that parsed", tabled=True)
def parsed_share(answer: Answer) -> tuple[int, int]:
    """Return whether the written answer names an option at all."""
    return int(parse_choice(answer.prediction, answer.options) is not None), 1
