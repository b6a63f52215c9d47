"""The settings of a prediction to a task in which nothing is left to be looked up or refused.

Whatever can be wrong without reading the model's weights is found here, before any work.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedfora.data.encoding import (
    PromptFormat,
    answer_tokens,
    check_context,
    encode_prompts,
    prompt_format_of,
)
from fedfora.data.loading import DataError, Example, options_of
from fedfora.evaluation.output import check_output, identity_of
from fedfora.evaluation.scores import check_packages, kind_of
from fedfora.evaluation.settings import PredictSettings
from fedfora.metrics.choice import letters_of
from fedfora.models.adapter_base import settings_of_base
from fedfora.models.loading import context_length, load_config, load_tokenizer
from fedfora.models.resolve import adapter_dir_of
from fedfora.models.saving import read_record

# What the adapter's training settled, and what holds at prediction too unless it is said anew.
_PROMPT_SETTINGS = ("template", "source_prefix", "max_source_length", "max_target_length")


@dataclass(frozen=True)
class PredictionPlan:
    """What is to be done.

    Args:
        settings: The settings, resolved.
        examples: The rows.
        prompts: Their token ids.
        options: The options of each row; none where the task is no choice.
        kind: The kind of task; None where nothing says it.
        adapter_dir: The adapter; None for the base alone.
        record: What is stored with the adapter.
        layout: How rows become prompts.
        identity: As `identity_of` returns it.
    """

    settings: PredictSettings
    examples: list[Example]
    prompts: list[list[int]]
    options: list[tuple[str, ...]]
    kind: str | None
    adapter_dir: Path | None
    record: dict[str, Any]
    layout: PromptFormat
    identity: str


def prepare(settings: PredictSettings, examples: list[Example]) -> PredictionPlan:
    """Resolve and check the settings of a prediction for some rows.

    Raises:
        ValueError: If rows, adapter, tokenizer or directory do not work; the message names the
            flag, or the file and the line.
    """
    predict = settings.predict
    if predict.metrics != "auto" and predict.do_eval and predict.predict_with_generate:
        check_packages(predict.metrics)
    adapter_dir = adapter_dir_of(predict.model_dir, predict.checkpoint_dir)
    record = {} if adapter_dir is None else _record(adapter_dir, predict.model_dir)
    if adapter_dir is not None:
        model = settings_of_base(settings.model, adapter_dir, settings.given, record)
        settings = replace(settings, model=model)
    kind, options = _kind(settings, examples)
    tokenizer = load_tokenizer(settings.model)
    prompt_format = _layout(settings, record, tokenizer)
    if settings.evaluation.max_new_tokens is None:
        longest = replace(settings.evaluation, max_new_tokens=prompt_format.max_target_length)
        settings = replace(settings, evaluation=longest)
    identity = identity_of(settings, examples, adapter_dir)
    check_output(settings, examples, identity)
    prompts = encode_prompts(examples, tokenizer, prompt_format)
    answers = [settings.evaluation.max_new_tokens or 0] * len(examples)
    if not predict.predict_with_generate:  # the references are read instead
        most = prompt_format.max_target_length
        answers = [min(answer_tokens(example, tokenizer), most) for example in examples]
    lengths = [len(ids) + answer for ids, answer in zip(prompts, answers, strict=True)]
    source = str(settings.data.test_file or settings.data.dataset)
    check_context(context_length(load_config(settings.model)), lengths, source)
    return PredictionPlan(
        settings, examples, prompts, options, kind, adapter_dir, record, prompt_format, identity
    )


def _record(adapter_dir: Path, model_dir: str | None) -> dict[str, Any]:
    """Return what is stored with the adapter, or with the run that a checkpoint belongs to."""
    for path in (adapter_dir, *([Path(model_dir)] if model_dir else []), adapter_dir.parent):
        if record := read_record(path):
            return record
    return {}


def _layout(settings: PredictSettings, record: dict[str, Any], tokenizer: Any) -> PromptFormat:
    own = prompt_format_of(settings.data, tokenizer)
    if not record:
        return own
    explicit = [name for name in _PROMPT_SETTINGS if name in settings.given]
    if settings.data.template == "auto":
        explicit = [name for name in explicit if name != "template"]
    layout = replace(
        PromptFormat(**record["prompts"]), **{name: getattr(own, name) for name in explicit}
    )
    if layout.template == "chat" and not tokenizer.chat_template:
        raise ValueError(
            f"--model_name_or_path {settings.model.model_name_or_path} has no chat template, and "
            "the adapter was trained with its base's: this is not its base (or --template plain)"
        )
    return layout


def _kind(
    settings: PredictSettings, examples: list[Example]
) -> tuple[str | None, list[tuple[str, ...]]]:
    """Return the kind of task and each row's options."""
    column = settings.predict.options_column
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
