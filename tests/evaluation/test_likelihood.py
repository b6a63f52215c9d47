"""Likelihoods of answers against the model's own loss, whatever the batch and the padding."""

import math

import pytest
import torch

from fedfora.data.encoding import encode_example, prompt_format_of
from fedfora.data.loading import Example, load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.likelihood import answer_likelihoods, loss_scores, option_likelihoods
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments


@pytest.fixture(scope="module")
def setup():
    base = load_base(ModelArguments(model_name_or_path="clinic-base", quantization="none"))
    prompt_format = prompt_format_of(DataArguments(), base.tokenizer)
    examples = load_examples("clinic:test", DataArguments())[:7]
    return base, prompt_format, examples


@torch.no_grad()
def test_they_are_the_models_own_loss(setup):
    base, prompt_format, examples = setup
    rows = [encode_example(example, base.tokenizer, prompt_format) for example in examples]
    found = answer_likelihoods(base.model, rows, batch_size=3)
    for row, likelihood in zip(rows, found, strict=True):
        tensors = {name: torch.tensor([ids]) for name, ids in row.items()}
        loss = float(base.model(**tensors).loss)
        assert -likelihood.log_probability / likelihood.num_tokens == pytest.approx(loss, rel=1e-4)
    scores = loss_scores(found)
    total = sum(likelihood.num_tokens for likelihood in found)
    assert scores["loss"] == pytest.approx(-sum(x.log_probability for x in found) / total)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_changes_nothing(setup, batch_size):
    base, prompt_format, examples = setup
    rows = [encode_example(example, base.tokenizer, prompt_format) for example in examples]
    one = answer_likelihoods(base.model, rows, batch_size=3)
    other = answer_likelihoods(base.model, rows, batch_size=batch_size)
    assert [x.num_tokens for x in one] == [x.num_tokens for x in other]
    for a, b in zip(one, other, strict=True):
        assert a.log_probability == pytest.approx(b.log_probability, rel=1e-4)


def test_each_row_has_its_own_options(setup):
    base, prompt_format, examples = setup
    options = [["a_b_c", "warfarin_dose_40 mg"], ["x", "y", "z"]]
    found = option_likelihoods(
        base.model, base.tokenizer, examples[:2], options, prompt_format, batch_size=4
    )
    assert [len(row) for row in found] == [2, 3]
    alone = option_likelihoods(
        base.model, base.tokenizer, [examples[1]], [["y"]], prompt_format, batch_size=1
    )
    assert found[1][1] == pytest.approx(alone[0][0], rel=1e-4)


def test_the_likeliest_of_a_copying_model_is_what_the_prompt_holds(setup):
    """The bundled base was trained to go on with text; its note names warfarin."""
    base, prompt_format, _ = setup
    example = Example("", "warfarin warfarin warfarin warfarin", None, {})
    (found,) = option_likelihoods(
        base.model, base.tokenizer, [example], [["warfarin", "xqzjv"]], prompt_format, batch_size=2
    )
    assert found[0] > found[1]
