"""A file of predictions to scores: fedfora's own, or any JSON with two columns of text."""

import json
from pathlib import Path
from typing import Any

from fedfora.data.loading import Example
from fedfora.evaluation.metrics import Answer
from fedfora.evaluation.scores import check_packages, kind_of, score


def score_file(
    path: str,
    *,
    metrics: str = "auto",
    prediction_column: str = "prediction",
    reference_column: str = "reference",
    seed: int = 42,
) -> dict[str, Any]:
    """Return the scores of a file.

    Args:
        path: JSON lines or a JSON list of rows.
        metrics: "triples", "text", "choice", or "auto" for what the references look like.
        prediction_column: Column with what the model wrote.
        reference_column: Column with what is right.
        seed: Seed of the confidence intervals.

    Raises:
        ValueError: If the file is missing or broken, a row has no reference, or a package is
            missing.
    """
    if metrics != "auto":
        check_packages(metrics)
    if not Path(path).is_file():
        raise ValueError(f"--predictions_file: no such file: {path}")
    answers = [
        _answer(row, where, prediction_column, reference_column) for where, row in _rows(Path(path))
    ]
    if not answers:
        raise ValueError(f"{path}: no rows")
    if metrics == "auto":
        with_options = all(answer.options for answer in answers)
        metrics = kind_of([answer.reference for answer in answers], with_options=with_options)
    return score(answers, metrics, seed=seed).summary


def _rows(path: Path) -> list[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}, row {n}", row) for n, row in enumerate(json.loads(text), start=1)]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from error
    rows = []
    # Not splitlines(): a JSON string may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}, line {number}"
        try:
            rows += [(where, json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: broken JSON: {error.msg}") from error
    return rows


def _answer(row: Any, where: str, prediction_column: str, reference_column: str) -> Answer:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
    for column, flag in (
        (prediction_column, "--prediction_column"),
        (reference_column, "--reference_column"),
    ):
        if row.get(column) is None:
            has = ", ".join(row)
            raise ValueError(f'{where}: no "{column}" to score; the row has: {has} ({flag})')
        if not isinstance(row[column], str):
            raise ValueError(f'{where}: "{column}" must be text, got {type(row[column]).__name__}')
    prompt = Example(row.get("instruction") or "", row.get("input") or "", None, {}).prompt
    return Answer(
        row[prediction_column],
        row[reference_column],
        prompt=prompt,
        options=tuple(row.get("options") or ()),
        likeliest=row.get("likeliest"),
    )
