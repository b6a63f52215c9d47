"""Gradient inversion: one row's update gives its answer away, and noise hides it.

The attacker is strong: it knows base, adapter, the row's prompt and how long the answer is, and for
every hidden token a short list that holds the right one. It goes through the hidden tokens again
and again and puts in each place the token of the list whose gradient points most nearly in the
direction of the update it saw (matching gradients as Zhu et al. 2019,
https://arxiv.org/abs/1906.08935, by their cosine as Geiping et al. 2020,
https://arxiv.org/abs/2003.14053; over tokens instead of numbers). The update is the gradient
itself, as the change of one step of gradient descent is.
"""

import random

import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq

from fedfora.adapter import ForaConfig
from fedfora.data.clinic import clinic_rows
from fedfora.data.encoding import IGNORED, encode_examples, prompt_format_of
from fedfora.data.loading import example_of
from fedfora.data.settings import DataArguments
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments
from fedfora.privacy.clipping import SecretNoise, shrink_factor
from fedfora.training.dp_sgd import per_example_gradients

CHOICES = 16  # tokens in each list, the right one among them
HIDDEN = 3  # answer tokens that the attacker does not know, from the first on
SWEEPS = 4  # through the hidden tokens, at most


class Attacker:
    """Knows a model with a fresh adapter, and sees updates of rows."""

    def __init__(self, model, tokenizer):
        self.model, self.vocabulary = model, range(len(tokenizer))
        self.collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def gradients(self, rows):
        """The rows' gradients of shape (rows, numbers)."""
        batch = dict(self.collate([dict(row) for row in rows]))
        _, gradients = per_example_gradients(self.model, batch)
        self.model.zero_grad()
        return torch.cat([grad.flatten(1).float() for grad in gradients.values()], dim=1)

    def update(self, row, others=(), noise_multiplier=0.0):
        """What is seen of a row: the sum with others' gradients, or one clipped and with noise."""
        grads = self.gradients([row, *others])
        if not noise_multiplier:
            return grads.sum(0)
        summed = (grads * shrink_factor(grads.norm(dim=1), 1.0)[:, None]).sum(0)
        return summed + SecretNoise().normal(summed.shape, noise_multiplier)

    def guess(self, row, hidden, update, rng):
        """The row's tokens as the attacker thinks they are; the right ones are in lists only."""
        lists = {}
        for place in hidden:
            right = row["input_ids"][place]
            wrong = [token for token in self.vocabulary if token != right]
            lists[place] = sorted([right, *rng.sample(wrong, CHOICES - 1)])
        known = list(row["input_ids"])
        for place in hidden:
            known[place] = rng.choice(lists[place])
        for _ in range(SWEEPS):
            before = list(known)
            for place in hidden:
                tried = [with_token(row, known, place, token) for token in lists[place]]
                likeness = torch.cosine_similarity(self.gradients(tried), update[None], dim=1)
                known[place] = lists[place][int(likeness.argmax())]
            if known == before:
                break
        return known

    def found(self, rows, others=(), noise_multiplier=0.0):
        """How many hidden tokens of all rows are read right."""
        right = 0
        for index, row in enumerate(rows):
            hidden = answer_places(row)[:HIDDEN]
            update = self.update(row, others, noise_multiplier)
            guess = self.guess(row, hidden, update, random.Random(index))
            right += sum(guess[place] == row["input_ids"][place] for place in hidden)
        return right


def answer_places(row):
    """The places of a row's answer tokens, but for the end of the sequence."""
    return [place for place, label in enumerate(row["labels"]) if label != IGNORED][:-1]


def with_token(row, known, place, token):
    ids = [*known[:place], token, *known[place + 1 :]]
    pairs = zip(row["labels"], ids, strict=True)
    return {"input_ids": ids, "labels": [IGNORED if old == IGNORED else new for old, new in pairs]}


@pytest.fixture(scope="module")
def bench(tiny_dir):
    """An attacker of a tiny base with a fresh adapter, and rows."""
    base = load_base(ModelArguments(model_name_or_path=tiny_dir, quantization="none"))
    torch.manual_seed(0)
    model = get_peft_model(base.model, ForaConfig(task_type="CAUSAL_LM", r=4))
    data = DataArguments()
    rows = [example_of(row, "", data, answers_needed=True) for row in clinic_rows()[:12]]
    encoded = encode_examples(rows, base.tokenizer, prompt_format_of(data, base.tokenizer))
    return Attacker(model.eval(), base.tokenizer), encoded


def test_one_rows_update_gives_its_answer_away(bench):
    attacker, rows = bench
    assert attacker.found(rows[:3]) == 3 * HIDDEN


def test_noise_hides_the_answer(bench):
    """Of 9 tokens a guess finds 0.6 on average; 5 or more with a probability of 1e-4."""
    attacker, rows = bench
    assert attacker.found(rows[:3], noise_multiplier=1.0) < 5


def test_an_update_is_the_sum_of_its_rows(bench):
    attacker, rows = bench
    whole = attacker.update(rows[0], rows[1:4])
    parts = sum(attacker.update(row) for row in rows[:4])
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-4 * float(parts.abs().max()))


def test_a_little_noise_lies_on_a_clipped_row(bench):
    attacker, rows = bench
    seen, plain = attacker.update(rows[0], noise_multiplier=1e-6), attacker.update(rows[0])
    assert torch.allclose(seen, plain / max(1.0, float(plain.norm())), atol=1e-5)


def test_hidden_are_the_answers_tokens_but_for_the_end(bench):
    row = bench[1][0]
    answer = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert [row["input_ids"][place] for place in answer_places(row)] == answer[:-1]
