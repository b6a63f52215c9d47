"""The directory of a prediction: which run it belongs to, and its files.

`predictions.partial.jsonl` while the run is in progress; `predictions.jsonl` and `scores.json` when
it is done. `environment.json` holds the identity of the run: the same command on the same rows,
adapter and base has the same identity and resumes its own work; any other is refused.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedfora.data.loading import DataError, Example, check_column, load_chosen, options_of
from fedfora.evaluation.scores import check_packages, kind_of
from fedfora.evaluation.settings import PredictSettings
from fedfora.metrics.choice import letters_of, parse_choice
from fedfora.metrics.triples import parse_triples
from fedfora.models.resolve import adapter_dir_of, check_named, read_record, settings_of_base
from fedfora.reporting.record import check_disk_space, check_output_dir, write_text

PREDICTIONS = "predictions.jsonl"
PARTIAL = "predictions.partial.jsonl"
SCORES = "scores.json"
_BYTES_PER_TOKEN = 8  # a token in UTF-8 and JSON, generously


# What would keep a prediction from its work, as far as that can be known before anything is loaded.


@dataclass(frozen=True)
class Checked:
    """A prediction that can begin, with settings resolved.

    `record` is what is stored with the adapter, `options` are each row's.
    """

    settings: PredictSettings
    examples: list[Example]
    options: list[tuple[str, ...]]
    kind: str | None
    adapter_dir: Path | None
    record: dict[str, Any]
    identity: str


def preflight(settings: PredictSettings) -> Checked:
    """Resolve the settings of a prediction, read its rows, and check both and the directory.

    Raises:
        ValueError: If rows, adapter or directory do not work; the message names the flag, or the
            file and the line.
    """
    predict = settings.predict
    if predict.metrics != "auto" and predict.do_eval and predict.predict_with_generate:
        check_packages(predict.metrics)
    adapter_dir = adapter_dir_of(predict.model_dir, predict.checkpoint_dir)
    check_named(settings.model, adapter_dir)
    check_output_dir(predict.output_dir, overwrite=True)
    examples = load_chosen(
        settings.data.test_file,
        settings.data,
        flag="--test_file",
        answers_needed=not predict.predict_with_generate,
    )[: settings.evaluation.max_eval_samples]
    record = {} if adapter_dir is None else _record(adapter_dir, predict.model_dir)
    model, evaluation = settings.model, settings.evaluation
    if adapter_dir is not None:
        model = settings_of_base(model, adapter_dir, settings.given, record)
    if evaluation.max_new_tokens is None:
        data = asdict(settings.data)
        prompts = data if "max_target_length" in settings.given or not record else record["prompts"]
        longest = prompts["max_target_length"]
        evaluation = replace(evaluation, max_new_tokens=longest)
    settings = replace(settings, model=model, evaluation=evaluation)
    kind, options = _kind(settings, examples)
    identity = identity_of(settings, examples, adapter_dir)
    check_output(settings, examples, identity)
    return Checked(settings, examples, options, kind, adapter_dir, record, identity)


def _record(adapter_dir: Path, model_dir: str | None) -> dict[str, Any]:
    """Return what is stored with the adapter, or with the run that a checkpoint belongs to."""
    for path in (adapter_dir, *([Path(model_dir)] if model_dir else []), adapter_dir.parent):
        if record := read_record(path):
            return record
    return {}


def _kind(
    settings: PredictSettings, examples: list[Example]
) -> tuple[str | None, list[tuple[str, ...]]]:
    column = settings.predict.options_column
    check_column(examples, column, "", "options_column")
    options = [
        options_of(example.columns.get(column), f"row {number}", column)
        for number, example in enumerate(examples, start=1)
    ]
    references = [example.output for example in examples if example.output is not None]
    kind: str | None = settings.predict.metrics
    if kind == "auto":
        kind = kind_of(references, with_options=all(options)) if references else None
    if kind != "choice":
        return kind, [()] * len(examples)
    if not references and not all(options):
        raise DataError(
            f'--metrics choice: neither options in the column "{column}" nor references that '
            "would name them (--options_column)"
        )
    everywhere = letters_of(references)
    return kind, [own or everywhere for own in options]


def identity_of(
    settings: PredictSettings, examples: list[Example], adapter_dir: Path | None
) -> str:
    """Return a digest of all that decides the answers, with the settings resolved.

    The batch size decides nothing where the tokens are not drawn, so a run that did not fit into
    memory can resume with smaller batches.
    """
    values = asdict(settings)
    del values["given"], values["predict"]["output_dir"], values["predict"]["overwrite_output_dir"]
    if not settings.decoding.do_sample:
        del values["evaluation"]["per_device_eval_batch_size"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for example in examples:
        digest.update(repr((example.instruction, example.input, example.output)).encode())
    if adapter_dir is not None:
        for name in ("adapter_config.json", "adapter_model.safetensors", "fedfora.json"):
            if (adapter_dir / name).is_file():
                digest.update((adapter_dir / name).read_bytes())
    base = Path(settings.model.model_name_or_path or "")
    for path in sorted(base.glob("*")) if base.is_dir() else [base] * base.is_file():
        digest.update(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def check_output(settings: PredictSettings, examples: list[Example], identity: str) -> None:
    """Raise if answers cannot be written, or would replace another run's, with the remedy."""
    directory = Path(settings.predict.output_dir)
    tokens = len(examples) * (settings.evaluation.max_new_tokens or 0)
    text = sum(len(e.prompt.encode()) + len((e.output or "").encode()) for e in examples)
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"--output_dir {directory} holds an adapter: name another directory")
    check_disk_space(directory, 2 * (text + tokens * _BYTES_PER_TOKEN))
    names = ("config.yaml", PREDICTIONS, PARTIAL, SCORES, "environment.json", "metrics.jsonl")
    existing = [name for name in names if (directory / name).exists()]
    if existing and not settings.predict.overwrite_output_dir and _held(directory) != identity:
        raise ValueError(
            f"--output_dir {directory} holds another run ({existing[0]}); name another directory, "
            "or --overwrite_output_dir"
        )


def finished_scores(directory: Path, identity: str) -> dict[str, Any] | None:
    """Return the scores of a run that was finished before; None where there is work to do."""
    is_finished = (directory / PREDICTIONS).is_file() or (directory / SCORES).is_file()
    if not is_finished or (directory / PARTIAL).is_file() or _held(directory) != identity:
        return None
    path = directory / SCORES
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def write_predictions(
    path: Path,
    examples: Sequence[Example],
    answers: Sequence[dict[str, Any]],
    row_scores: dict[int, dict[str, float]],
    kind: str | None,
) -> None:
    """Write one JSON object per row.

    Args:
        path: The file.
        examples: The rows.
        answers: `prediction` of each row, and for a choice `options`, `likeliest` and
            `log_probabilities`.
        row_scores: The scores of those rows that have some.
        kind: The kind of task, which says what the parsed form is; None for no parsed form.
    """
    lines = []
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        row: dict[str, Any] = {
            "instruction": example.instruction,
            "input": example.input,
            "reference": example.output,
            **answer,
        }
        if kind is not None:
            row["parsed"] = parsed(answer["prediction"], answer.get("options", ()), kind)
        if number in row_scores:
            row["scores"] = row_scores[number]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def parsed(prediction: str, options: Sequence[str], kind: str) -> Any:
    """Return what a kind of task reads out of a prediction: triples, an option, or the text."""
    if kind == "triples":
        return parse_triples(prediction)[0]
    if kind == "choice":
        index = parse_choice(prediction, options)
        return None if index is None else options[index]
    return prediction.strip()


def _held(directory: Path) -> str | None:
    """Return the identity of the run whose directory this is."""
    path = directory / "environment.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("identity"))
    except (OSError, json.JSONDecodeError, AttributeError):
        return None


# Answers as they come, in a file that a killed run leaves whole and its successor reads.
# One line per batch, written and synced at once. A line that was cut by the kill is dropped.


class Journal:
    """The answers so far of one run, by row number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, dict[str, Any]]:
        """Return what is kept, and cut off what is not whole."""
        if not self.path.is_file():
            return {}
        answers: dict[int, dict[str, Any]] = {}
        raw = self.path.read_bytes()
        complete = raw.rfind(b"\n") + 1
        if complete < len(raw):
            os.truncate(self.path, complete)
        for line in raw[:complete].splitlines():
            answers |= {int(row): answer for row, answer in json.loads(line).items()}
        return answers

    def append(self, answers: dict[int, dict[str, Any]]) -> None:
        """Add the answers of a batch: all of them, or, after a kill, none.

        Raises:
            OSError: If they cannot be written, e.g. because the disk is full.
        """
        line = (json.dumps(answers, ensure_ascii=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(28, "no space left on device", str(self.path))
            os.fsync(file.fileno())
