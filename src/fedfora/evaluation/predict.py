"""`fedfora predict` and `fedfora evaluate`: an adapter and rows to predictions.jsonl and scores."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedfora.data.encoding import prompt_format
from fedfora.data.loading import Example, load_examples
from fedfora.evaluation.evaluate import evaluate, score
from fedfora.evaluation.settings import PredictSettings
from fedfora.evaluation.triples import parse_triples
from fedfora.models.loading import base_name_of, load_adapter, load_base
from fedfora.models.saving import read_prompt_format
from fedfora.reporting.record import write_text
from fedfora.reporting.view import View

PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"


def predict(settings: PredictSettings, view: View) -> dict[str, Any]:
    """Answer the rows of the test file, write predictions and scores, and return the scores.

    The base model and the prompt format are those the adapter was trained with, unless the settings
    name another base. Without references in every row there are predictions and no scores.

    Raises:
        ValueError: If rows, adapter or model do not work; the message names the flag.
    """
    if settings.data.test_file is None:
        raise ValueError("--test_file is missing: a file, or clinic:test")
    examples = load_examples(settings.data.test_file, settings.data, answers_needed=False)
    examples = examples[: settings.evaluation.max_eval_samples]
    adapter_dir = settings.predict.model_dir
    named = settings.model
    if adapter_dir is not None and named.model_name_or_path is None:
        named = replace(named, model_name_or_path=base_name_of(adapter_dir))
    base = load_base(named)
    model = base.model if adapter_dir is None else load_adapter(base, adapter_dir)
    stored = None if adapter_dir is None else read_prompt_format(adapter_dir)
    view.total = len(examples)
    result = evaluate(
        model,
        base.tokenizer,
        examples,
        stored or prompt_format(settings.data, base.tokenizer),
        batch_size=settings.evaluation.per_device_eval_batch_size,
        max_new_tokens=settings.evaluation.max_new_tokens,
        on_batch=lambda rows: view.advance(rows, f"{int(view.done) + rows}/{len(examples)} rows"),
    )
    directory = Path(settings.predict.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_predictions(directory / PREDICTIONS, examples, result.predictions)
    write_text(directory / SCORES, json.dumps(result.scores, indent=2) + "\n")
    return result.scores


def write_predictions(path: Path, examples: list[Example], predictions: list[str]) -> None:
    """Write one JSON object per row: instruction, input, reference, prediction, parsed triples."""
    lines = [
        json.dumps(
            {
                "instruction": example.instruction,
                "input": example.input,
                "reference": example.output,
                "prediction": prediction,
                "triples": parse_triples(prediction)[0],
            },
            ensure_ascii=False,
        )
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")


def score_file(path: str) -> dict[str, Any]:
    """Return the scores of a predictions file.

    Raises:
        ValueError: If the file is missing or broken, or a row has no reference.
    """
    if not Path(path).is_file():
        raise ValueError(f"--predictions_file: no such file: {path}")
    predictions, references = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            predictions.append(row["prediction"])
            references.append(row["reference"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: no prediction and reference: {error}"
            ) from error
        if references[-1] is None:
            raise ValueError(f"{path}, line {number}: there is no reference to score against")
    if not references:
        raise ValueError(f"{path}: no rows")
    return score(predictions, references)
