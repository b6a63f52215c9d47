"""`--dataset NAME` in `--dataset_dir DIR`: dataset_info.json says which file and which columns.

The format is that of LLaMA-Factory, from which the original program took its two flags.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedfora.data.settings import DataArguments
from fedfora.data.sources import DataError
from fedfora.registry import unknown

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

    Args:
        file: What the user gave under `flag`; it wins.
        settings: With `dataset` and `dataset_dir`.
        flag: For the message when nothing was given.

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
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}"
        ) from error
    if name not in catalog:
        raise DataError(f"{path}: {unknown('data set', name, catalog)} (--dataset)")
    entry = catalog[name]
    if not isinstance(entry, dict) or not {"file_name", "hf_hub_url"} & entry.keys():
        raise DataError(f"{path}: {name} has neither file_name nor hf_hub_url")
    return entry


def _columns(entry: dict[str, Any], where: str) -> dict[str, Any]:
    if entry.get("formatting", "alpaca") != "alpaca":
        raise DataError(f"{where}: formatting {entry['formatting']!r} is not read, only alpaca")
    named = entry.get("columns", {})
    if unread := sorted(named.keys() - _ROLES.keys()):
        raise DataError(f"{where}: columns {unread} are not read (known: {', '.join(_ROLES)})")
    return {_ROLES[role]: column for role, column in named.items()}
