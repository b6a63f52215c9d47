"""What a file of rows holds and what is wrong with it, row by row; nothing is trained."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedfora.data.encoding import PromptFormat, answer_tokens, prompt_tokens
from fedfora.data.loading import Example, example_of
from fedfora.data.settings import DataArguments
from fedfora.data.sources import DataError, rows_of

PERCENTILES = (50, 90, 95, 99, 100)


@dataclass
class RowsReport:
    """What a source of rows holds.

    Args:
        source: Its name.
        places: File and line of every good row.
        examples: The good rows.
        broken: One message for each broken row, with file, line and column.
        columns: Column name to how many rows have it.
    """

    source: str
    places: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    columns: Counter[str] = field(default_factory=Counter)

    def empty_answers(self) -> list[str]:
        """Return the places of rows whose answer is present, but empty or blank."""
        return [
            place
            for place, example in zip(self.places, self.examples, strict=True)
            if not (example.output or "").strip()
        ]

    def duplicates(self) -> list[tuple[str, str]]:
        """Return the places of rows that repeat an earlier one, each with the earlier one's."""
        first: dict[tuple[Any, ...], str] = {}
        pairs = []
        for place, example in zip(self.places, self.examples, strict=True):
            content = (example.prompt, example.output, example.history)
            earlier = first.setdefault(content, place)
            if earlier != place:
                pairs.append((place, earlier))
        return pairs


def read_rows(source: str, settings: DataArguments) -> RowsReport:
    """Read all rows, broken ones too.

    Raises:
        DataError: If the source cannot be read at all.
    """
    report = RowsReport(source)
    for where, row in rows_of(source):
        if isinstance(row, dict):
            report.columns.update(map(str, row))
        try:
            report.examples.append(example_of(row, where, settings, answers_needed=True))
            report.places.append(where)
        except DataError as error:
            report.broken.append(str(error))
    return report


def rows_in_common(one: RowsReport, other: RowsReport) -> list[tuple[str, str]]:
    """Return where the two sources hold the same prompt; what is tested must not be trained on."""
    prompts = {e.prompt: place for place, e in zip(one.places, one.examples, strict=True)}
    return [
        (prompts[example.prompt], place)
        for place, example in zip(other.places, other.examples, strict=True)
        if example.prompt in prompts
    ]


def token_percentiles(
    examples: list[Example], tokenizer: Any, prompt_format: PromptFormat
) -> dict[str, dict[int, int]]:
    """Return the percentiles of the tokens of prompts and answers, before anything is cut.

    Returns:
        "prompt" and "answer", each percentile in `PERCENTILES` to tokens; the answer's end counts.
    """
    lengths = {
        "prompt": [prompt_tokens(example, tokenizer, prompt_format) for example in examples],
        "answer": [answer_tokens(example, tokenizer) for example in examples],
    }
    return {
        name: {p: int(np.percentile(values, p, method="higher")) for p in PERCENTILES}
        for name, values in lengths.items()
    }
