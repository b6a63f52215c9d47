"""A source of rows, a file, a bundled name or a data set on the Hub, to `(where, row)` pairs."""

import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedfora.data.clinic import clinic_rows
from fedfora.data.settings import DataArguments
from fedfora.registry import counted, nearest, try_hub, unknown

BUNDLED = {"clinic": "train", "clinic:train": "train", "clinic:test": "test"}
FORMATS = (".json", ".jsonl", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%+-]+)?")


class DataError(ValueError):
    """A file or a row that cannot be used; the message says where it is."""


def rows_of(source: str) -> Iterator[tuple[str, Any]]:
    """Yield `(where, row)` for every row; `row` is a DataError where a line could not be read.

    Args:
        source: Path of a .json (list or lines), .jsonl, .csv or .parquet file; a bundled name; or a
            data set on the Hub or in a directory, `owner/name` or `owner/name:split`.

    Raises:
        DataError: If there is no such source, or it cannot be read at all.
    """
    path = Path(source)
    if _IN_MEMORY.fullmatch(source):
        if source not in _held:
            raise DataError(
                f"{source}: these rows came from a Python program; pass them again "
                f"({source.split()[0]}=ROWS)"
            )
        rows = _held[source]
    elif source in BUNDLED:
        rows = clinic_rows(BUNDLED[source])
    elif path.suffix == ".parquet" and path.is_file():
        rows = _parquet_rows(source)
    elif path.is_file():
        if path.suffix not in FORMATS:
            known = ", ".join(FORMATS)
            raise DataError(f"{source}: unknown format {path.suffix!r} (known: {known})")
        text = text_of(source)
        yield from _csv_rows(source, text) if path.suffix == ".csv" else json_rows(source, text)
        return
    elif (path.suffix not in FORMATS and _HUB_ID.fullmatch(source)) or path.is_dir():
        rows = _hub_rows(source)
    else:
        hint = nearest(path.name, (other.name for other in path.parent.glob("*.*")))
        raise DataError(f"no such file: {source}{hint} (bundled data sets: {', '.join(BUNDLED)})")
    yield from _numbered(source, rows)


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


# Rows that a Python program holds: they have a name like a file's and are written nowhere.
# The name has no digest of them: it is on the adapter's card, where somebody who knows all rows but
# one could use a digest to find that row.

_IN_MEMORY = re.compile(r"\w+ in memory \([\d,]+ rows?\)")
_held: dict[str, Iterable[Any]] = {}


@contextmanager
def held_rows(option: str, rows: Collection[Any]) -> Iterator[str]:
    """Let `rows_of` find these rows under the name that the block is given, while it lasts.

    They are the value of `option`, e.g. "train_file": a list of mappings, or a `datasets.Dataset`.
    """
    name = f"{option} in memory ({counted(len(rows), 'row')})"
    if name in _held:
        raise DataError(f"{name}: another call of this process, with as many rows, still runs")
    _held[name] = rows
    try:
        yield name
    finally:
        del _held[name]


def text_of(source: str) -> str:
    """Return a file's text unchanged: line ends are not translated."""
    try:
        return Path(source).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error


def _hub_rows(source: str) -> Iterable[Any]:
    path = Path(source)
    if path.is_dir() and not any(file.suffix in FORMATS for file in path.rglob("*")):
        raise DataError(f"{source}: a directory without rows, no {', '.join(FORMATS)} in it")
    from datasets import load_dataset

    unreached = "" if path.is_dir() else try_hub()
    name, _, split = source.partition(":")
    if path.is_dir():
        name, split = str(path.resolve()), ""  # "." is no name to it
    try:
        return load_dataset(name, split=split or "train")  # type: ignore[no-any-return]
    except Exception as error:  # whatever the hub, the network or a file format brings up
        reason = unreached or str(error).split("\n")[0]
        raise DataError(
            f"{source}: no such file, and no data set could be loaded by that name: {reason}"
        ) from error


def _parquet_rows(source: str) -> Iterable[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(source).to_pylist()  # type: ignore[no-any-return]
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{source}: not a readable Parquet file: {error}") from error


def _csv_rows(source: str, text: str) -> Iterator[tuple[str, Any]]:
    """Yield rows with as many cells as the header; any other is a DataError.

    Raises:
        DataError: At a mistake in quoting: behind it nobody can say where a row begins.
    """
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        where = f"{source}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{where}: broken CSV: {error} (double a quote inside a cell)"
            ) from error
        if not cells:
            continue
        if not header:
            header = cells
            if doubles := [name for name in header if name and header.count(name) > 1]:
                raise DataError(f"{where}: two columns are named {doubles[0]!r}")
        elif len(cells) != len(header):
            cells_here = counted(len(cells), "cell")
            message = f"{cells_here}, the header has {len(header)} (quote cells with commas)"
            yield where, DataError(f"{where}: {message}")
        else:
            yield where, dict(zip(header, cells, strict=True))


def json_rows(source: str, text: str) -> Iterator[tuple[str, Any]]:
    """Yield `(where, row)` for a JSON list or JSON lines; `row` is a DataError where one is broken.

    Raises:
        DataError: If a list cannot be read.
    """
    if text.lstrip().startswith("["):
        yield from _numbered(source, _json_list(source, text))
        return
    # Not splitlines(): a JSON string may hold U+2028 and its like unescaped.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if not line.strip():
            continue
        where, row = f"{source}, line {number}", None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = DataError(_json_mistake(where, error))
        yield where, row


def _json_list(source: str, text: str) -> list[Any]:
    try:
        return list(json.loads(text))
    except json.JSONDecodeError as error:
        raise DataError(_json_mistake(f"{source}, line {error.lineno}", error)) from error
    except (ValueError, RecursionError) as error:
        place = text.index("[") + 1
        try:  # where is it? The rows before it can be read
            while True:
                place = re.compile(r"[\s,]*").match(text, place).end()  # type: ignore[union-attr]
                place = json.JSONDecoder().raw_decode(text, place)[1]
        except (ValueError, RecursionError):
            line = text.count("\n", 0, place) + 1
        raise DataError(_json_mistake(f"{source}, line {line}", error)) from error


def _json_mistake(where: str, error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{where}, column {error.colno}: broken JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return f"{where}: lists or objects nested too deeply to be read"
    # Python's limit: longer ones take minutes.
    return f"{where}: a number of more than 4,300 digits"


# `--dataset NAME` in `--dataset_dir DIR`: dataset_info.json says which file and which columns.
# The format is that of LLaMA-Factory, from which the original program took its two flags.

CATALOG = "dataset_info.json"

# Their name of a column's role to ours.
_ROLES = {
    "prompt": "instruction_column",
    "query": "prompt_column",
    "response": "response_column",
    "history": "history_column",
}


def chosen_source(
    file: str | None, settings: DataArguments, *, flag: str
) -> tuple[str, DataArguments]:
    """Return the source of rows, and the settings with the columns the catalog names.

    Raises:
        DataError: If nothing was given, or the catalog does not have it.
    """
    if file is not None:
        return file, settings
    if settings.dataset is None:
        raise DataError(f"{flag} is missing: a file, or clinic (or --dataset and --dataset_dir)")
    directory = Path(settings.dataset_dir)
    entry = _entry(directory, settings.dataset)
    columns = _columns(entry, f"{directory / CATALOG}: {settings.dataset}")
    source = entry.get("hf_hub_url") or str(directory / str(entry.get("file_name")))
    return str(source), replace(settings, **columns)


def _entry(directory: Path, name: str) -> dict[str, Any]:
    path = directory / CATALOG
    try:
        catalog = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--dataset_dir {directory}: no {CATALOG} there: {error}") from error
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(_json_mistake(f"{path}{line}", error)) from error
    if not isinstance(catalog, dict):
        raise DataError(f"{path}: expected an object with a data set under each name")
    if name not in catalog:
        raise DataError(f"{path}: {unknown('data set', name, catalog)} (--dataset)")
    entry = catalog[name]
    if not isinstance(entry, dict) or not any(map(entry.get, ("file_name", "hf_hub_url"))):
        raise DataError(f"{path}: {name} has neither file_name nor hf_hub_url")
    return entry


def _columns(entry: dict[str, Any], where: str) -> dict[str, Any]:
    if entry.get("formatting", "alpaca") != "alpaca":
        raise DataError(f"{where}: formatting {entry['formatting']!r} is not known, only alpaca")
    columns = entry.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(c, str) for c in columns.values()):
        raise DataError(f"{where}: columns must be names of columns by role, got {columns!r}")
    if unread := sorted(columns.keys() - _ROLES.keys()):
        raise DataError(f"{where}: columns {unread} are not supported (known: {', '.join(_ROLES)})")
    return {_ROLES[role]: column for role, column in columns.items()}
