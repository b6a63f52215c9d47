"""The models against equivalent Llamas, and the laws that every decoder keeps."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from fedfora.models.baichuan import modeling
from fedfora.models.baichuan.modeling import BaichuanForCausalLM, alibi_slopes

pytestmark = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def load(checkpoint, attention="sdpa", **options):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation=attention, **options
    ).eval()


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


def cache_of(output):
    return output["cache"] if "cache" in output else output["past_key_values"]


@pytest.fixture
def model(checkpoint, attention):
    return load(checkpoint, attention)


@pytest.fixture
def llama(model, attention):
    """The Llama with the same weights: q, k and v apart, the rows of the head normalized."""
    config = {
        name: getattr(model.config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "rms_norm_eps",
        )
    }
    llama = LlamaForCausalLM(LlamaConfig(**config, attn_implementation=attention)).eval()
    state = model.state_dict()
    for name in [name for name in state if "W_pack" in name]:
        for letter, weight in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace("W_pack", f"{letter}_proj")] = weight
    llama.load_state_dict(state)
    return llama


def greedy(model, ids, **inputs):
    return model.generate(ids, max_new_tokens=8, do_sample=False, min_new_tokens=8, **inputs)


def as_llama_reads_it(size, ids):
    """Positions for Llama: its own for 7B; for 13B none, but ALiBi's biases in the mask."""
    if size == "7b":
        return {}
    mask = torch.full((1, 6, 21, 21), torch.finfo(torch.float32).min)
    for head, slope in enumerate(alibi_slopes(6).tolist()):
        for query in range(21):
            for key in range(query + 1):
                mask[0, head, query, key] = slope * (key - query)
    return {"attention_mask": mask, "position_ids": torch.zeros_like(ids), "use_cache": False}


def test_it_is_the_llama_with_the_same_weights(model, llama, ids, size):
    expected = logits(llama, ids, **as_llama_reads_it(size, ids))
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


def test_positions_matter(model, ids):
    """The last token sees the same tokens in another order."""
    moved = ids.clone()
    moved[:, [2, 9]] = ids[:, [9, 2]]
    assert (logits(model, moved)[:, -1] - logits(model, ids)[:, -1]).abs().max() > 1e-3


def test_no_token_sees_what_comes_after_it(model, ids):
    changed = ids.clone()
    changed[:, 12:] = 5
    difference = (logits(model, changed) - logits(model, ids)).abs().amax(dim=(0, 2))
    assert difference[:12].max() < 1e-5
    assert difference[12:].max() > 1e-3


def test_padding_on_either_side_changes_nothing(model, ids, left):
    padded = logits(model, ids * left, attention_mask=left)
    right = left.flip(1)
    shifted = logits(model, (ids * left).flip(1), attention_mask=right)
    for row, length in enumerate(left.sum(1).tolist()):
        alone = logits(model, ids[row : row + 1, -length:])[0]
        torch.testing.assert_close(padded[row, -length:], alone, rtol=0, atol=1e-5)
        backwards = logits(model, ids[row : row + 1, -length:].flip(1))[0]
        torch.testing.assert_close(shifted[row, :length], backwards, rtol=0, atol=1e-5)


@pytest.fixture(params=modeling.NAMES_OF_CACHE)
def spelling(request, monkeypatch):
    """Lets transformers call the cache by one name, whatever the installed version calls it."""
    own, name = modeling.CACHE, request.param
    real_model, real_attention = LlamaModel.forward, modeling.BaichuanAttention.forward

    def model_forward(self, *args, **kwargs):
        return real_model(self, *args, **{own: kwargs.pop(name)}, **kwargs)

    def attention_forward(self, *args, **kwargs):
        return real_attention(self, *args, **{name: kwargs.pop(own)}, **kwargs)

    monkeypatch.setattr(modeling, "CACHE", name)
    monkeypatch.setattr(LlamaModel, "forward", model_forward)
    monkeypatch.setattr(modeling.BaichuanAttention, "forward", attention_forward)
    return name


def test_cached_is_uncached_under_either_name_of_the_cache(model, ids, spelling):
    expected = logits(model, ids)
    with torch.no_grad():
        first = model.model(ids[:, :13], use_cache=True)
        chunk = model.model(ids[:, 13:18], **{spelling: cache_of(first)})
        token = model.model(ids[:, 18:19], **{spelling: cache_of(chunk)})
        got = model.lm_head(torch.cat([o.last_hidden_state for o in (first, chunk, token)], dim=1))
    torch.testing.assert_close(got, expected[:, :19], rtol=0, atol=1e-5)


def test_generation_is_the_same_without_a_cache_and_with_a_static_one(model, ids, left):
    batch = {"ids": ids * left, "attention_mask": left}
    expected = greedy(model, **batch)
    assert torch.equal(greedy(model, **batch, use_cache=False), expected)
    assert torch.equal(greedy(model, **batch, cache_implementation="static"), expected)


def test_packed_rows_are_separate_rows(model, ids):
    lengths = [5, 9, 7]
    packed = ids[:1]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    got = logits(model, packed, position_ids=position_ids, use_cache=False)[0]
    alone = [logits(model, part)[0] for part in packed.split(lengths, dim=1)]
    torch.testing.assert_close(got, torch.cat(alone), rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(model, ids, left):
    labels = ids.masked_fill(left == 0, -100)

    def gradients():
        model.train().zero_grad()
        model(ids, attention_mask=left, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-6, msg=name)


def test_padding_has_no_gradient_of_its_own(model, ids, left):
    """A row of padding that sees nothing must not spoil the gradients of the others."""
    model.train()
    labels = ids.masked_fill(left == 0, -100)
    model(ids, attention_mask=left, labels=labels).loss.backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    count = int((labels[:, 1:] != -100).sum())
    for row, length in enumerate(left.sum(1).tolist()):
        # The token before a row's first one is padding: its loss depends on the padding alone.
        loss = model(ids[row : row + 1, -length:]).logits[0, :-1]
        target = ids[row, -length:][1:]
        (F.cross_entropy(loss, target, reduction="sum") / count).backward()
    up = "model.layers.0.mlp.up_proj.weight"
    largest = dict(model.named_parameters())[up].grad.abs().max()
    assert padded[up].abs().max() < 10 * largest


def test_float16_and_bfloat16_stay_near_float32(checkpoint, attention, ids, left):
    expected = logits(load(checkpoint, attention), ids)
    for dtype in (torch.float16, torch.bfloat16):
        got = logits(load(checkpoint, attention, dtype=dtype), ids, attention_mask=left)
        assert got.dtype == dtype
        assert (got.float() - expected)[0].norm() < 0.05 * expected[0].norm()


def test_a_saved_model_is_reloaded_to_the_bit(model, ids, attention, tmp_path):
    model.save_pretrained(tmp_path)
    again = load(tmp_path, attention)
    assert type(again) is BaichuanForCausalLM
    assert torch.equal(logits(again, ids), logits(model, ids))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["norm_head"] is False
    assert config["position_embedding"] == model.config.position_embedding


def test_new_tokens_leave_the_old_ones_alone(model, ids, attention, tmp_path):
    expected = logits(model, ids)
    model.resize_token_embeddings(104)
    assert torch.equal(logits(model, ids)[..., :96], expected)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, attention)
    assert again.lm_head.weight.shape[0] == 104
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_decoder_alone_and_classifier_load_from_the_same_checkpoint(
    model, checkpoint, attention, ids, left
):
    decoder = AutoModel.from_pretrained(checkpoint, attn_implementation=attention).eval()
    with torch.no_grad():
        hidden = decoder(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(ids).logits)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, attn_implementation=attention
    ).eval()
    nn.init.normal_(classifier.score.weight)
    # Rows end with padding: the classifier reads the last token that is none.
    texts = torch.where(left.flip(1).bool(), ids, 0)
    scores = logits(classifier, texts, attention_mask=left.flip(1))
    for row, length in enumerate(left.sum(1).tolist()):
        alone = logits(classifier, texts[row : row + 1, :length])
        torch.testing.assert_close(scores[row], alone[0], rtol=1e-5, atol=1e-5)


def test_it_compiles_without_a_break(model, ids, left):
    expected = logits(model, ids, attention_mask=left, use_cache=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = logits(compiled, ids, attention_mask=left, use_cache=False)
    torch.testing.assert_close(got[left.bool()], expected[left.bool()], rtol=0, atol=1e-5)
