"""A model and held-out examples to predictions and scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedfora.data.encoding import PromptFormat, encode_prompt
from fedfora.data.loading import Example
from fedfora.evaluation.generate import generate
from fedfora.evaluation.triples import TripleScores, are_triples, score_triples


@dataclass(frozen=True)
class Evaluation:
    """Predictions for every row, and their scores; none where a row has no reference."""

    predictions: list[str]
    scores: dict[str, Any]


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    layout: PromptFormat,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Answer every example as the adapter was trained to, and score the answers.

    Args:
        model: The model, with or without adapter.
        tokenizer: Its tokenizer.
        examples: The rows; they are scored if all have references.
        layout: The prompt format of the training.
        batch_size: Prompts per batch.
        max_new_tokens: Longest answer; None takes the format's `max_target_length`.
        on_batch: Called with the number of rows answered.
    """
    predictions = generate(
        model,
        tokenizer,
        [encode_prompt(example, tokenizer, layout) for example in examples],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens or layout.max_target_length,
        on_batch=on_batch,
    )
    references = [example.output for example in examples if example.output is not None]
    scored = len(references) == len(examples)
    return Evaluation(predictions, score(predictions, references) if scored else {})


def score(predictions: list[str], references: list[str]) -> dict[str, Any]:
    """Return exact match, and the scores of triples where the references are triples."""
    exact = sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))
    scores: dict[str, Any] = {"rows": len(references), "exact_match": exact / len(references)}
    if are_triples(references):
        scores |= flat(score_triples(predictions, references))
    return scores


def flat(scores: TripleScores) -> dict[str, Any]:
    """Return triple scores with the micro scores at the top, as tables and logs want them."""
    return {
        "precision": scores.micro.precision,
        "recall": scores.micro.recall,
        "f1": scores.micro.f1,
        "macro_f1": scores.macro.f1,
        "parse_rate": scores.parse_rate,
        "relation_f1": {name: score.f1 for name, score in scores.per_relation.items()},
    }
