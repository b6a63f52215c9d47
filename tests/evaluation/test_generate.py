"""Batched answers equal those one by one."""

import pytest

from fedfora.data.encoding import encode_prompt, prompt_format
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.evaluate import evaluate
from fedfora.evaluation.generate import generate
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments


@pytest.fixture(scope="module")
def setup():
    base = load_base(ModelArguments(model_name_or_path="clinic-base", quantization="none"))
    prompts = prompt_format(DataArguments(), base.tokenizer)
    examples = load_examples("clinic:test", DataArguments())[:12]
    return base, prompts, examples


def test_the_batch_size_changes_nothing(setup):
    base, prompts, examples = setup
    ids = [encode_prompt(example, base.tokenizer, prompts) for example in examples]
    answers = {
        size: generate(base.model, base.tokenizer, ids, batch_size=size, max_new_tokens=12)
        for size in (1, 5, 12)
    }
    assert answers[1] == answers[5] == answers[12]
    assert len(set(answers[1])) > 6


def test_answers_come_back_in_the_order_of_the_prompts(setup):
    base, prompts, examples = setup
    ids = [encode_prompt(example, base.tokenizer, prompts) for example in examples]
    forwards = generate(base.model, base.tokenizer, ids, batch_size=4, max_new_tokens=8)
    backwards = generate(base.model, base.tokenizer, ids[::-1], batch_size=4, max_new_tokens=8)
    assert forwards == backwards[::-1]


def test_every_row_is_reported_once(setup):
    base, prompts, examples = setup
    seen = []
    evaluate(
        base.model,
        base.tokenizer,
        examples,
        prompts,
        batch_size=5,
        max_new_tokens=2,
        on_batch=seen.append,
    )
    assert seen == [5, 5, 2]


def test_rows_without_references_are_answered_and_not_scored(setup):
    from dataclasses import replace

    base, prompts, examples = setup
    rows = [replace(examples[0], output=None), examples[1]]
    result = evaluate(base.model, base.tokenizer, rows, prompts, batch_size=2, max_new_tokens=2)
    assert len(result.predictions) == 2
    assert result.scores == {}


def test_the_base_alone_knows_nothing_of_the_target_format(setup):
    base, prompts, examples = setup
    result = evaluate(
        base.model, base.tokenizer, examples, prompts, batch_size=12, max_new_tokens=40
    )
    assert result.scores["f1"] <= 0.1
