"""A file of predictions to scores: fedfora's own, or any JSON with two columns of text."""

from pathlib import Path
from typing import Any

from fedfora.data.loading import Example, options_of, text_in
from fedfora.data.sources import json_rows, text_of
from fedfora.evaluation.scores import check_packages, kind_of, score
from fedfora.metrics import Answer


def score_file(
    path: str,
    *,
    metrics: str = "auto",
    prediction_column: str = "prediction",
    reference_column: str = "reference",
    seed: int = 42,
    original: bool = False,
) -> dict[str, Any]:
    """Return the scores of a file.

    Args:
        path: JSON lines or a JSON list of rows.
        metrics: "triples", "text", "choice", or "auto" for what the references look like.
        prediction_column: Column with what the model wrote.
        reference_column: Column with what is right.
        seed: Seed of the confidence intervals.
        original: Whether to score as the original program did, too.

    Raises:
        ValueError: If the file is missing or broken, a row has no reference, or a package is
            missing.
    """
    if metrics != "auto":
        check_packages(metrics)
    if not Path(path).is_file():
        raise ValueError(f"--predictions_file: no such file: {path}")
    answers = [
        _answer(row, where, prediction_column, reference_column)
        for where, row in json_rows(path, text_of(path, Path(path)))
    ]
    if not answers:
        raise ValueError(f"{path}: no rows")
    if metrics == "auto":
        with_options = all(answer.options for answer in answers)
        metrics = kind_of([answer.reference for answer in answers], with_options=with_options)
    return score(answers, metrics, seed=seed, original=original).summary


def _answer(row: Any, where: str, prediction_column: str, reference_column: str) -> Answer:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
    for column, flag in (
        (prediction_column, "--prediction_column"),
        (reference_column, "--reference_column"),
    ):
        if row.get(column) is None:
            has = ", ".join(row)
            raise ValueError(f'{where}: no "{column}" to score; the row has: {has} ({flag})')
    columns = (prediction_column, reference_column, "instruction", "input")
    prediction, reference, instruction, given = (text_in(row, c, where) or "" for c in columns)
    return Answer(
        prediction,
        reference,
        prompt=Example(instruction, given, None, {}).prompt,
        options=options_of(row.get("options") or None, where, "options"),
        likeliest=row.get("likeliest"),
    )
