"""Files to examples: every row is checked, every complaint names the file and the line."""

import csv
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfora.data.clinic import clinic_rows
from fedfora.data.settings import DataArguments

logger = logging.getLogger(__name__)

BUNDLED = {"clinic": "train", "clinic:train": "train", "clinic:test": "test"}
FORMATS = (".json", ".jsonl", ".csv")


class DataError(ValueError):
    """A file or a row that cannot be used; the message says where it stands."""


@dataclass(frozen=True)
class Example:
    """One row: what to do, on which text, with which answer (None when the row has none)."""

    instruction: str
    input: str
    output: str | None
    columns: dict[str, Any]

    @property
    def prompt(self) -> str:
        """Instruction and input, on two lines unless the instruction leads into the input."""
        if not self.instruction or not self.input:
            return self.instruction or self.input
        leads = self.instruction[-1].isspace() or self.instruction[-1] in ":："
        return f"{self.instruction}{'' if leads else chr(10)}{self.input}"


def load_examples(
    source: str, settings: DataArguments, *, answers_needed: bool = True
) -> list[Example]:
    """Read all rows of a file or of a bundled data set.

    Args:
        source: Path of a .json (list or lines), .jsonl or .csv file, or a bundled name.
        settings: Names of the columns, and whether broken rows are skipped.
        answers_needed: Whether a row without an answer is broken.

    Raises:
        DataError: If the file is missing or empty, or a row is broken, naming file and line.
    """
    examples, skipped = [], 0
    for where, row in _rows(source):
        try:
            examples.append(_example(row, where, settings, answers_needed))
        except DataError:
            if not settings.skip_bad_rows:
                raise
            skipped += 1
    if skipped:
        logger.warning("%s: skipped %d broken rows of %d", source, skipped, skipped + len(examples))
    if not examples:
        raise DataError(f"{source}: no rows")
    return examples


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """Yield `(where, row)`; `row` is a DataError where the line could not be read."""
    if source in BUNDLED:
        for number, row in enumerate(clinic_rows(BUNDLED[source]), start=1):
            yield f"{source}, row {number}", row
        return
    path = Path(source)
    if not path.is_file():
        raise DataError(f"no such file: {source} (bundled data sets: {', '.join(BUNDLED)})")
    if path.suffix not in FORMATS:
        raise DataError(f"{source}: unknown format {path.suffix!r} (known: {', '.join(FORMATS)})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start}") from error
    if path.suffix == ".csv":
        yield from _csv_rows(source, text)
    elif text.lstrip().startswith("["):
        yield from _json_list_rows(source, text)
    else:
        yield from _json_lines_rows(source, text)


def _csv_rows(source: str, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    for row in reader:
        yield f"{source}, line {reader.line_num}", row


def _json_list_rows(source: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


def _json_lines_rows(source: str, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): a JSON string may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = DataError(
                f"{source}, line {number}, column {error.colno}: broken JSON: {error.msg}"
            )
        yield f"{source}, line {number}", row


def _example(row: Any, where: str, settings: DataArguments, answers_needed: bool) -> Example:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with columns, got {type(row).__name__}")
    instruction = _text(row, settings.instruction_column, where) or ""
    prompt = _text(row, settings.prompt_column, where) or ""
    output = _text(row, settings.response_column, where)
    if not instruction and not prompt:
        raise DataError(
            f'{where}: "{settings.instruction_column}" and "{settings.prompt_column}" are both '
            f"missing or empty; the row has: {_names(row)} (--instruction_column, --prompt_column)"
        )
    if answers_needed and output is None:
        raise DataError(
            f'{where}: "{settings.response_column}" is missing; the row has: {_names(row)} '
            "(--response_column)"
        )
    return Example(instruction, prompt, output, row)


def _text(row: dict[str, Any], column: str, where: str) -> str | None:
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    raise DataError(f'{where}: "{column}" must be text, got {type(value).__name__}')


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "nothing"
