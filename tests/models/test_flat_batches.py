"""A flat batch loses what the padded one does, computes no padding, and shared tokens once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from fedfora.data.encoding import IGNORED
from fedfora.models import losses
from fedfora.models.baichuan.configuration import BaichuanConfig
from fedfora.models.batches import FlatBatch, collate, shared_tokens
from fedfora.models.losses import flat_batch, lies_flat, losses_of, token_losses
from tiny_models import GROUPED, SIZES, gradients, recompute_blocks

NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FLAT = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=64),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.3),
    "phi": PhiConfig(**SIZES),
    "phi3": Phi3Config(**GROUPED),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, **NO_DROPOUT),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "opt": OPTConfig(**SIZES, ffn_dim=48, dropout=0.0, word_embed_proj_dim=32),
    "baichuan 7B": BaichuanConfig(**SIZES, position_embedding="rope"),
    "baichuan 13B, ALiBi": BaichuanConfig(**SIZES, position_embedding="alibi"),
}
PADDED = {
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(**SIZES),
    "mamba": MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
    "gemma2, eager": Gemma2Config(**GROUPED, head_dim=8, attn_implementation="eager"),
}
LENGTHS, SHARED = (19, 31, 12, 26, 31), 7


def a_model(config, dtype=torch.float32):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for p in model.parameters():  # large enough that places and neighbours matter
        p.data += 0.1 * torch.randn_like(p)
    return model.train()


def a_batch(lengths=LENGTHS, shared=SHARED, answer=4):
    torch.manual_seed(4)
    ids = torch.randint(3, 97, (len(lengths), max(lengths)))
    ids[:, :shared] = ids[0, :shared]
    ids[:, shared] = torch.arange(len(lengths)) + 3
    rows = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    return collate(
        [
            {"input_ids": row, "labels": [IGNORED] * (len(row) - answer) + row[-answer:]}
            for row in rows
        ]
    )


def close(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed anew"])
def test_losses_and_gradients_are_those_of_padded_rows(name, checkpointing):
    model, batch = a_model(FLAT[name]), a_batch()
    if checkpointing:
        recompute_blocks(model)
    flat = flat_batch(model, batch)
    assert flat.shared == SHARED
    expected_N, expected_row_N = losses_of(model, batch, None)
    expected = gradients(model, expected_N.sum())
    loss_N, row_N = token_losses(model, batch)
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-4, atol=1e-5)
    assert row_N.equal(expected_row_N)
    close(gradients(model, loss_N.sum()), expected)


@pytest.mark.parametrize("name", PADDED)
def test_models_that_cannot_be_told_where_rows_begin_have_padded_rows(name):
    model, batch = a_model(PADDED[name]), a_batch()
    assert not lies_flat(model)
    assert flat_batch(model, batch) is None
    assert model.training
    token_losses(model, batch)


def test_a_model_that_counts_places_through_the_sequence_is_found_out():
    """All its layers take part, and it is still wrong: the check compares losses, too."""
    model, forgetful = (a_model(FLAT["llama"]) for _ in range(2))
    forgetful.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    assert lies_flat(model)
    assert not lies_flat(forgetful)


def test_a_model_with_a_layer_that_never_asks_for_attention_is_not_trusted():
    """Its losses agree here, but what that layer does between tokens nobody has checked."""
    model = a_model(FLAT["llama"])
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    assert not lies_flat(model)


def test_equal_rows_without_a_loss_lose_nothing():
    row = {"input_ids": [5, 6, 7], "labels": [IGNORED] * 3}
    loss_N, row_N = token_losses(a_model(FLAT["llama"]), collate([row, row]))
    assert (len(loss_N), len(row_N)) == (0, 0)


def test_no_row_sees_another_and_none_a_later_token():
    """Whatever other rows hold: a changed token changes its row's losses from there on only."""
    model, batch = a_model(FLAT["llama"]), a_batch(answer=10)
    with torch.no_grad():
        before_N, row_N = token_losses(model, batch)
        for row, length in enumerate(LENGTHS):
            changed = {name: tensor.clone() for name, tensor in batch.items()}
            changed["input_ids"][row, length - 6] += 1
            after_N, _ = token_losses(model, changed)
            same = after_N == before_N
            assert same[row_N != row].all()
            own = same[row_N == row]
            assert own[:5].all()  # the labels are as they were
            assert not own[5:].any()


@pytest.mark.parametrize("shared", [0, SHARED])
def test_every_linear_layer_sees_each_token_once(shared):
    model, batch, seen = a_model(FLAT["llama"]), a_batch(shared=shared), set()
    lies_flat(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(lambda _, args, out: seen.add(out.shape[:-1].numel()))
    token_losses(model, batch)
    assert seen == {sum(LENGTHS) - shared * (len(LENGTHS) - 1)}


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=6),
    st.integers(0, 8),
)
def test_shared_tokens_are_those_before_the_first_loss_that_all_rows_have(sizes, start):
    rows = [
        {
            "input_ids": [5] * start + [row + 6] * own + [7] * answer,
            "labels": [IGNORED] * (start + own) + [7] * answer,
        }
        for row, (own, answer) in enumerate(sizes)
    ]
    batch = collate(rows)
    shared = shared_tokens(batch)
    assert shared == (0 if len(rows) == 1 else start)
    flat = FlatBatch(batch["attention_mask"], shared)
    own = [token for row in rows for token in row["input_ids"][shared:]]
    assert flat.lay(batch["input_ids"])[0].tolist() == [5] * shared + own


def test_a_token_before_a_loss_is_no_shared_one():
    row = {"input_ids": [5, 6, 7], "labels": [IGNORED, IGNORED, 7]}
    assert shared_tokens(collate([row, row])) == 1
    learned = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}  # prompts that are trained, too
    assert shared_tokens(collate([learned, learned])) == 0


def test_bfloat16_is_as_exact_flat_as_padded():
    exact_model, batch = a_model(FLAT["llama"]), a_batch()
    exact = gradients(exact_model, losses_of(exact_model, batch, None)[0].sum())
    model = a_model(FLAT["llama"]).to(torch.bfloat16)
    apart = []
    for flat in (None, flat_batch(model, batch)):
        found = gradients(model, losses_of(model, batch, flat)[0].sum())
        apart.append(sum((found[n].float() - g).square().sum() for n, g in exact.items()).sqrt())
    assert flat is not None
    assert apart[1] < 1.3 * apart[0]


def test_each_row_draws_its_own_dropout():
    config = LlamaConfig(**GROUPED, attention_dropout=0.5)
    model, batch = a_model(config), a_batch()
    assert flat_batch(model, batch).shared == 0
    assert flat_batch(model.eval(), batch).shared == SHARED
    model = a_model(FLAT["llama"])
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    assert flat_batch(model, batch).shared == 0


@pytest.mark.parametrize("window", ["sliding_window", "attention_chunk_size"])
def test_rows_longer_than_a_window_are_padded(window):
    config = LlamaConfig(**GROUPED)
    setattr(config, window, max(LENGTHS))
    model = a_model(config)
    assert flat_batch(model, a_batch()) is not None
    assert flat_batch(model, a_batch((*LENGTHS, max(LENGTHS) + 1))) is None


def test_trying_a_model_leaves_no_trace(monkeypatch):
    model, batch = a_model(FLAT["llama"]), a_batch()
    calls = []
    monkeypatch.setattr(losses, "_agrees", lambda *_: calls.append(1) or True)
    state = torch.get_rng_state()
    token_losses(model, batch)
    token_losses(model, batch)
    assert calls == [1]
    assert torch.get_rng_state().equal(state)


def test_other_inputs_than_rows_and_labels_stay_as_they_are():
    model, batch = a_model(FLAT["llama"]), a_batch()
    places = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    assert flat_batch(model, batch | {"position_ids": places}) is None
    expected, _ = token_losses(model, batch)
    torch.testing.assert_close(token_losses(model, batch | {"position_ids": places})[0], expected)
