"""Rows to examples: every row is checked, every complaint names the file and the line."""

import logging
from dataclasses import dataclass
from typing import Any

from fedfora.data.settings import TASKS, DataArguments
from fedfora.data.sources import DataError, chosen_source, rows_of
from fedfora.registry import nearest

__all__ = ["DataError", "Example", "load_chosen", "load_examples"]

logger = logging.getLogger(__name__)

COLUMNS = ("instruction_column", "prompt_column", "response_column", "history_column")
DEFAULTS = {"instruction", "input", "output", "options"}  # may be absent


@dataclass(frozen=True)
class Example:
    """One row: what to do, on which text, with which answer (None when the row has none).

    `history` holds the earlier questions and answers of a conversation, oldest first.
    """

    instruction: str
    input: str
    output: str | None
    columns: dict[str, Any]
    history: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        """Instruction and input, on two lines unless the instruction leads into the input."""
        if not self.instruction or not self.input:
            return self.instruction or self.input
        leads = self.instruction[-1].isspace() or self.instruction[-1] in ":："
        return f"{self.instruction}{'' if leads else chr(10)}{self.input}"


def load_chosen(
    file: str | None, settings: DataArguments, *, flag: str, answers_needed: bool = True
) -> list[Example]:
    """Read the rows of a file, or, without one, of `--dataset` in `--dataset_dir`.

    `flag` names the file, for the message when nothing was given.

    Raises:
        DataError: If nothing was given, or a row is broken.
    """
    source, settings = chosen_source(file, settings, flag=flag)
    return load_examples(source, settings, answers_needed=answers_needed)


def load_examples(
    source: str, settings: DataArguments, *, answers_needed: bool = True
) -> list[Example]:
    """Read all rows of a source.

    Args:
        source: A file, a bundled name or a data set on the Hub, as `rows_of` takes it.
        settings: Names of the columns, and whether broken rows are skipped.
        answers_needed: Whether a row without an answer is broken.

    Raises:
        DataError: If the source is missing or empty, or a row is broken, naming file and line.
    """
    examples, skipped = [], []
    for where, row in rows_of(source):
        try:
            examples.append(example_of(row, where, settings, answers_needed=answers_needed))
        except DataError as error:
            if not settings.skip_bad_rows:
                raise
            skipped.append(error)
    if skipped:
        rows = len(skipped) + len(examples)
        logger.warning(
            "%s: skipped %d of %d rows, first: %s", source, len(skipped), rows, skipped[0]
        )
    if not examples:
        raise DataError(f"{source}: no rows")
    check_columns(examples, settings, source)
    return examples


def check_columns(examples: list[Example], settings: DataArguments, source: str) -> None:
    """Raise if no row has a column that was named: the rows would be read without it."""
    for name in COLUMNS:
        check_column(examples, getattr(settings, name), f"{source}: ", name)


def check_column(examples: list[Example], column: str | None, where: str, flag: str) -> None:
    """Raise if no row has a named column, with the nearest; what flags mean by default is there."""
    known = DEFAULTS.union(*(example.columns for example in examples))
    if column is not None and column not in known:
        hint, found = nearest(column, map(str, known)), _names(examples[0].columns)
        raise DataError(f'{where}no row has "{column}"{hint}; row 1 has: {found} (--{flag})')


def shared_instruction(examples: list[Example]) -> str | None:
    """Return the instruction that all examples have; None where they differ or have none."""
    instructions = {example.instruction for example in examples}
    return instructions.pop() or None if len(instructions) == 1 else None


def example_of(row: Any, where: str, settings: DataArguments, *, answers_needed: bool) -> Example:
    """Return the example that a row holds.

    `row` is its columns by name, or the DataError that reading it brought; `where` its file and
    line.

    Raises:
        DataError: If the row is broken, naming file, line and column.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with columns, got {type(row).__name__}")
    task = TASKS[settings.task]
    prompt_column = settings.prompt_column or task.prompt_column
    response_column = settings.response_column or task.response_column
    instruction = text_in(row, settings.instruction_column, where) or ""
    prompt = text_in(row, prompt_column, where) or ""
    output = text_in(row, response_column, where)
    if not instruction and not prompt:
        raise DataError(
            f'{where}: "{settings.instruction_column}" and "{prompt_column}" are both '
            f"missing or empty; the row has: {_names(row)} (--instruction_column, --prompt_column)"
        )
    if answers_needed and output is None:
        raise DataError(
            f'{where}: "{response_column}" is missing{nearest(response_column, row)}; '
            f"the row has: {_names(row)} (--response_column)"
        )
    history = _history(row, settings.history_column, where)
    return Example(instruction or task.instruction, prompt, output, row, history)


def text_in(row: dict[str, Any], column: str, where: str) -> str | None:
    """Return a column's text, or None if the row has no text there.

    Raises:
        DataError: If there is something else, or text that cannot be written.
    """
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f'{where}: "{column}" must be text, got {type(value).__name__}')
    return _whole(value, column, where)


def options_of(found: Any, where: str, column: str) -> tuple[str, ...]:
    """Return the options that a row's column holds; of letters with their texts, the letters.

    `where` and `column` are for the message.

    Raises:
        DataError: If there is anything other than at least two texts.
    """
    if found is None:
        return ()
    options = list(found) if isinstance(found, dict) else found
    texts = isinstance(options, list) and all(isinstance(option, str) for option in options)
    if not texts or len(options) < 2:
        raise DataError(
            f'{where}: "{column}" must be a list of at least two texts, or an object of letters '
            f"and texts, got {found!r} (--options_column)"
        )
    return tuple(_whole(option, column, where) for option in options)


def _whole(text: str, column: str, where: str) -> str:
    """Return a text, if it can be written: JSON may hold half of a character, where one was cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise DataError(
            f'{where}: "{column}" holds half a character ({half}) at position {error.start + 1}'
        ) from error
    return text


def _history(row: dict[str, Any], column: str | None, where: str) -> tuple[tuple[str, str], ...]:
    turns = (row.get(column) if column else None) or ()
    if not isinstance(turns, list | tuple):
        raise DataError(f'{where}: "{column}" must be a list of [question, answer] pairs')
    for number, turn in enumerate(turns, start=1):
        is_pair = isinstance(turn, list | tuple) and len(turn) == 2
        if not is_pair or not all(isinstance(text, str) for text in turn):
            raise DataError(
                f'{where}: "{column}" must be a list of [question, answer] pairs; turn {number} is '
                f"{turn!r} (--history_column)"
            )
    return tuple(
        (_whole(question, str(column), where), _whole(answer, str(column), where))
        for question, answer in turns
    )


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "nothing"
