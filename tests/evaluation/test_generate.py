"""Batched answers equal those one by one, and greedy means greedy."""

from dataclasses import replace
from random import Random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)

from fedfora.data.encoding import encode_prompt, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation import generate as generating
from fedfora.evaluation.evaluate import evaluate
from fedfora.evaluation.generate import batches_by_length, generate
from fedfora.evaluation.settings import DecodingArguments
from fedfora.models.baichuan.configuration import BaichuanConfig
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments


@pytest.fixture(scope="module")
def setup():
    base = load_base(ModelArguments(model_name_or_path="clinic-base", quantization="none"))
    prompts = prompt_format_of(DataArguments(), base.tokenizer)
    examples = load_examples("clinic:test", DataArguments())[:12]
    return base, prompts, examples


@pytest.fixture(scope="module")
def answers_to(setup):
    base, prompts, examples = setup
    ids = [encode_prompt(example, base.tokenizer, prompts) for example in examples]

    def answers(batch_size, max_new_tokens=12, order=1, **decoding):
        return generate(
            base.model,
            base.tokenizer,
            ids[::order],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            decoding=DecodingArguments(**decoding),
        )

    return answers


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}])
def test_the_batch_size_changes_nothing(answers_to, decoding):
    one = answers_to(1, **decoding)
    assert one == answers_to(5, **decoding) == answers_to(12, **decoding)
    assert len(set(one)) > 6


def test_padding_adds_no_token_to_a_row(setup, answers_to, monkeypatch):
    """A repetition penalty counts padding too, and many tokenizers pad with what ends an answer."""
    model, padded = setup[0].model, []
    generate_as_ever = model.generate

    def spy(**inputs):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            padded.append(not mask.all())
            assert set(ids.tolist()) == set(ids[mask == 1].tolist())
        return generate_as_ever(**inputs)

    monkeypatch.setattr(model, "generate", spy)
    answers_to(12)
    assert any(padded)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
PLAIN = {  # what may attend to all that came before
    "llama": (LlamaConfig, GROUPED),
    "baichuan, alibi": (BaichuanConfig, {**SIZES, "position_embedding": "alibi"}),
    "gpt2, learned positions": (
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
    ),
}
SLIDING = {
    "mistral": (MistralConfig, {**GROUPED, "sliding_window": 8}),
    "gemma2": (Gemma2Config, {**GROUPED, "head_dim": 8, "sliding_window": 8}),
}
NUM_SHARED, TAILS = 24, [1, 30, 2, 9, 9, 5, 3, 7, 8, 8, 40, 1, 2, 3, 4, 5, 6, 1]


@pytest.fixture(scope="module")
def answered(setup):
    """How a random model of a kind answers prompts that begin alike, and what it computed."""
    tokenizer = setup[0].tokenizer

    def answer(kind, batch_size, **decoding):
        config, sizes = (PLAIN | SLIDING)[kind]
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **sizes))
        with torch.no_grad():  # so that the answers do not repeat one token
            model.get_output_embeddings().weight.copy_(torch.randn(len(tokenizer), 32))
        generator = torch.Generator().manual_seed(2)

        def ids(count):
            return torch.randint(4, len(tokenizer), (count,), generator=generator).tolist()

        shared = ids(NUM_SHARED)
        model.generation_config = GenerationConfig(eos_token_id=list(range(4, len(tokenizer), 8)))
        passes, copied = [], []
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: passes.append(tuple(args[0].shape))
        )
        whole = model.get_output_embeddings()
        whole.register_forward_hook(lambda _, args, __: copied.append(not args[0].is_contiguous()))
        answers = generate(
            model,
            tokenizer,
            [shared + ids(length) for length in TAILS],
            max_new_tokens=24,
            batch_size=batch_size,
            decoding=DecodingArguments(**decoding),
        )
        assert not any(copied)  # a head's weights would be copied once for each row
        return answers, passes

    return answer


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 2}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("kind", PLAIN | SLIDING)
def test_rows_that_begin_alike_and_end_apart_are_answered_as_alone(answered, kind, decoding):
    alone, _ = answered(kind, 1, **decoding)
    assert answered(kind, 8, **decoding)[0] == alone
    assert answered(kind, len(TAILS), **decoding)[0] == alone
    assert len({len(answer) for answer in alone}) > 3


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_in_any_batches_are_answered_as_alone(setup, seed):
    tokenizer, draw = setup[0].tokenizer, Random(seed)
    vocabulary = len(tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocabulary, **GROUPED))
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(torch.randn(vocabulary, 32))
    ends = list(range(4, vocabulary, draw.choice([2, 5, 12])))
    model.generation_config = GenerationConfig(eos_token_id=ends)

    def ids(count):
        return [draw.randrange(4, vocabulary) for _ in range(count)]

    shared = ids(draw.choice([0, 3, 30]))
    prompts = [shared + ids(draw.randint(1, 50)) for _ in range(draw.randint(2, 40))]
    decoding = DecodingArguments(repetition_penalty=draw.choice([1.0, 1.3]))
    options = {"max_new_tokens": draw.choice([1, 2, 16]), "decoding": decoding}
    alone = generate(model, tokenizer, prompts, batch_size=1, **options)
    for batch_size in (None, 7):
        assert generate(model, tokenizer, prompts, batch_size=batch_size, **options) == alone


@pytest.mark.parametrize("kind", PLAIN)
def test_what_prompts_begin_with_is_computed_once_and_no_more_than_half_of_the_rows_have_ended(
    answered, kind
):
    _, passes = answered(kind, len(TAILS), repetition_penalty=1.5)
    begun = [(3, 40), (14, 9), (1, 1)]  # rows of like length, each to its group's longest
    assert passes[:4] == [(1, NUM_SHARED), *begun]
    rows = [count for count, length in passes[4:] if length == 1]
    assert len(rows) == len(passes) - 4
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 1


def test_answers_come_back_in_the_order_of_the_prompts(answers_to):
    assert answers_to(4, 8) == answers_to(4, 8, order=-1)[::-1]


def test_rows_with_options_are_a_choice_in_a_federation_as_in_predict(setup):
    base, prompts, examples = setup
    rows = [
        replace(example, output="no", columns={"options": ["yes", "no"]})
        for example in examples[:2]
    ]
    evaluated = [base.model, base.tokenizer, rows, prompts]
    result = evaluate(*evaluated, batch_size=2, max_new_tokens=2)
    assert result.kind == "choice"
    assert "accuracy" in result.scores
    rows[1] = replace(rows[1], columns={"options": "yes or no"})
    assert evaluate(*evaluated, batch_size=2, max_new_tokens=2).kind == "text"


@torch.no_grad()
def test_greedy_is_the_likeliest_token_of_a_forward_without_cache(setup, answers_to):
    base, prompts, examples = setup
    ids = encode_prompt(examples[0], base.tokenizer, prompts)
    start = len(ids)
    for _ in range(12):
        logits = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    assert answers_to(12)[0] == base.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_models_own_generation_defaults_are_set_aside_and_put_back(setup, answers_to):
    base, _, _ = setup
    plain, kept = answers_to(12), base.model.generation_config
    own = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=3.0, top_k=5)
    base.model.generation_config = own
    try:
        assert answers_to(12) == plain
        assert base.model.generation_config is own
    finally:
        base.model.generation_config = kept


def test_the_models_own_end_tokens_end_an_answer(setup, answers_to):
    base, _, _ = setup
    plain, kept = answers_to(12), base.model.generation_config
    first = base.tokenizer(plain[0], add_special_tokens=False)["input_ids"][2]
    base.model.generation_config = GenerationConfig(eos_token_id=[first])
    try:
        assert len(answers_to(12)[0]) < len(plain[0])
    finally:
        base.model.generation_config = kept


def test_sampling_repeats_with_its_seed_and_leaves_other_draws_alone(answers_to):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = answers_to(4, do_sample=True, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert one == answers_to(4, do_sample=True, seed=1)
    assert one != answers_to(4, do_sample=True, seed=2)
    assert one != answers_to(4)


def test_sampling_among_one_token_is_greedy(answers_to):
    assert answers_to(4, do_sample=True, top_k=1) == answers_to(4)
    assert answers_to(4, do_sample=True, temperature=1e-4) == answers_to(4)


def test_the_longest_go_first_and_rows_of_a_length_stay_together(setup):
    batches = batches_by_length(setup[0].model, [3, 9, 3, 9, 5], 2)
    assert list(batches) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_size_a_batch_has_as_many_rows_as_its_keys_and_values_allow(monkeypatch, dtype):
    model = load_base(
        ModelArguments(model_name_or_path="clinic-base", quantization="none", torch_dtype=dtype)
    ).model
    cache = model(torch.ones(1, 7, dtype=torch.long), use_cache=True).past_key_values
    seven = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def sizes(lengths):
        return [len(rows) for rows in batches_by_length(model, lengths, None)]

    assert sizes([7] * 150) == [64, 64, 22]
    monkeypatch.setattr(generating, "CACHE_BYTES", 10**8)
    fit = 10**8 // seven
    assert sizes([7 * fit] + [7 * (fit // 5)] * 12) == [1, 5, 5, 2]
    assert sizes([10**9, 1]) == [1, 1]


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
