"""An update of one row gives its answer away; sums hide some of it, noise all of it."""

import pytest
import torch
from peft import get_peft_model

from fedfora.adapter import ForaConfig
from fedfora.data.clinic import clinic_rows
from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import example_of
from fedfora.data.settings import DataArguments
from fedfora.evaluation.inversion import Inversion, Protection, hidden_places
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments

CHOICES = 16


@pytest.fixture(scope="module")
def bench(tiny_dir):
    """An attacker of a tiny base with a fresh adapter, and rows."""
    base = load_base(ModelArguments(model_name_or_path=tiny_dir, quantization="none"))
    torch.manual_seed(0)
    model = get_peft_model(base.model, ForaConfig(task_type="CAUSAL_LM", r=4))
    data = DataArguments()
    rows = [example_of(row, "", data, answers_needed=True) for row in clinic_rows()[:12]]
    encoded = encode_examples(rows, base.tokenizer, prompt_format_of(data, base.tokenizer))
    kinds = {"num_tokens": 3, "num_choices": CHOICES, "batch_size": 16, "seed": 0}
    return Inversion(model.eval(), base.tokenizer, **kinds), encoded


def test_one_rows_update_gives_its_answer_away(bench):
    inversion, rows = bench
    found = inversion.attack(rows[:3], rows[3:], Protection("none"))
    assert (found.tokens, found.chance) == (9, 1 / CHOICES)
    assert found.found == 9


def test_noise_hides_the_answer(bench):
    """Of 9 tokens a guess finds 0.6 on average; 5 or more with a probability of 1e-4."""
    inversion, rows = bench
    found = inversion.attack(rows[:3], rows[3:], Protection("noise", 0, 1.0))
    assert found.found < 5


def test_an_update_is_the_sum_of_its_rows(bench):
    inversion, rows = bench
    whole = inversion.update(rows[0], rows[1:4], 0.0)
    parts = sum(inversion.update(row, [], 0.0) for row in rows[:4])
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-4 * float(parts.abs().max()))


def test_a_little_noise_lies_on_a_clipped_row(bench):
    inversion, rows = bench
    seen, plain = inversion.update(rows[0], [], 1e-6), inversion.update(rows[0], [], 0.0)
    assert torch.allclose(seen, plain / max(1.0, float(plain.norm())), atol=1e-5)


def test_hidden_are_the_answers_tokens_but_for_the_end(bench):
    row = bench[1][0]
    answer = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert [row["input_ids"][place] for place in hidden_places(row)] == answer[:-1]
