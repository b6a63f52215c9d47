"""A model and held-out examples to predictions and scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfora.data.encoding import PromptFormat, encode_prompt
from fedfora.data.loading import DataError, Example, options_of
from fedfora.evaluation.generate import generate
from fedfora.evaluation.output import write_predictions
from fedfora.evaluation.scores import kind_of, score, with_options
from fedfora.evaluation.settings import OPTIONS_COLUMN
from fedfora.metrics import Answer


@dataclass(frozen=True)
class Evaluation:
    """Predictions for every row, and their scores; none where a row has no reference.

    `kind` is the kind of task that they were scored as, `answers` are the rows as they were scored.
    """

    predictions: list[str]
    scores: dict[str, Any] = field(default_factory=dict)
    row_scores: list[dict[str, float]] = field(default_factory=list)
    kind: str | None = None
    answers: Sequence[Answer] = ()

    def scores_of(self, chosen: Sequence[int]) -> dict[str, Any]:
        """Return the scores of some of the rows, by their numbers; none where nothing is scored."""
        if self.kind is None:
            return {}
        return score([self.answers[i] for i in chosen], self.kind).summary

    def write(
        self, path: Path, examples: list[Example], sites: Mapping[str, Sequence[int]]
    ) -> None:
        """Write predictions.jsonl, one object per row, with the site whose kind of row it is."""
        answers: list[dict[str, Any]] = [{"prediction": text} for text in self.predictions]
        if self.kind == "choice":
            for line, answer in zip(answers, self.answers, strict=True):
                line["options"] = answer.options
        for site, rows in sites.items():
            for row in rows:
                answers[row]["site"] = site
        write_predictions(path, examples, answers, dict(enumerate(self.row_scores)), self.kind)


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    prompt_format: PromptFormat,
    *,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Answer every example as the adapter was trained to, greedily, and score the answers.

    Args:
        model: The model, with or without adapter.
        tokenizer: Its tokenizer.
        examples: The rows; they are scored if all have references, as a choice where all have
            options, otherwise by the kind of task that the references look like.
        prompt_format: The prompt format of the training.
        batch_size: Prompts per batch, as for `batches_by_length`.
        max_new_tokens: Longest answer; None takes the format's `max_target_length`.
        on_batch: Called with the number of rows answered.
    """
    prompts = [encode_prompt(example, tokenizer, prompt_format) for example in examples]
    length = max_new_tokens or prompt_format.max_target_length
    predictions = generate(
        model, tokenizer, prompts, max_new_tokens=length, batch_size=batch_size, on_batch=on_batch
    )
    options = [_options(example) for example in examples]
    answers = [
        Answer(prediction, example.output, prompt=example.prompt, options=own)
        for example, prediction, own in zip(examples, predictions, options, strict=True)
        if example.output is not None
    ]
    if len(answers) < len(examples):
        return Evaluation(predictions)
    kind = kind_of([answer.reference for answer in answers], with_options=all(options))
    if kind == "choice":
        answers = with_options(answers)
    scores = score(answers, kind)
    return Evaluation(predictions, scores.summary, scores.rows, kind, answers)


def _options(example: Example) -> tuple[str, ...]:
    """Return a row's options; a column of that name with other content does not count."""
    try:
        return options_of(example.columns.get(OPTIONS_COLUMN), "row", OPTIONS_COLUMN)
    except DataError:
        return ()
