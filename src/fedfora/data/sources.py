"""A source of rows, a file, a bundled name or a data set on the Hub, to `(where, row)` pairs."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedfora.data.clinic import clinic_rows

BUNDLED = {"clinic": "train", "clinic:train": "train", "clinic:test": "test"}
FORMATS = (".json", ".jsonl", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%+-]+)?")


class DataError(ValueError):
    """A file or a row that cannot be used; the message says where it stands."""


def rows_of(source: str) -> Iterator[tuple[str, Any]]:
    """Yield `(where, row)` for every row; `row` is a DataError where a line could not be read.

    Args:
        source: Path of a .json (list or lines), .jsonl, .csv or .parquet file; a bundled name; or a
            data set on the Hub or in a directory, `owner/name` or `owner/name:split`.

    Raises:
        DataError: If there is no such source, or it cannot be read at all.
    """
    if source in BUNDLED:
        for number, row in enumerate(clinic_rows(BUNDLED[source]), start=1):
            yield f"{source}, row {number}", row
        return
    path = Path(source)
    if path.is_file():
        yield from _file_rows(source, path)
    elif (path.suffix not in FORMATS and _HUB_ID.fullmatch(source)) or path.is_dir():
        yield from _hub_rows(source)
    else:
        raise DataError(f"no such file: {source} (bundled data sets: {', '.join(BUNDLED)})")


def _file_rows(source: str, path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix not in FORMATS:
        raise DataError(f"{source}: unknown format {path.suffix!r} (known: {', '.join(FORMATS)})")
    if path.suffix == ".parquet":
        yield from _parquet_rows(source)
        return
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


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the hub, the network or a file format brings up
        raise DataError(
            f"{source}: no such file, and no data set could be loaded by that name: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


def _parquet_rows(source: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(source)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{source}: no Parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{source}, row {number}", row


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
