"""How rows become batches is no matter of the result: packed = padded, checkpointed = not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM

from fedfora.adapter.state import fold, read_state
from fedfora.data.encoding import IGNORED, encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.models.adapter_base import add_adapter
from fedfora.models.batches import collate
from fedfora.models.loading import load_base
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.privacy.settings import PrivacyArguments
from fedfora.training.local import check_trainable, train_locally
from fedfora.training.packing import collate_packed, num_tokens, pack, passes_of
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments, check_device

STEP = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 16,
}


@pytest.fixture(scope="module")
def setup(tiny_dir):
    base = load_base(ModelArguments(model_name_or_path=tiny_dir, quantization="none"))
    model = add_adapter(base, AdapterArguments(lora_rank=2), seed=1)
    examples = load_examples("clinic", DataArguments())[:16]
    encoded = encode_examples(
        examples, base.tokenizer, prompt_format_of(DataArguments(), base.tokenizer)
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    return base, model, encoded, start


def trained(setup, **settings):
    """Three full-batch steps from the same start."""
    _base, model, encoded, start = setup
    for name, p in model.named_parameters():
        p.data.copy_(start[name])
    arguments = TrainArguments(**(STEP | settings))
    result = train_locally(model, encoded, arguments, stretch=StepWindow(0, 3, 3), seed=5)
    return fold(read_state(model)), result


@pytest.fixture(scope="module")
def padded(setup):
    return trained(setup)


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "packing_length": 200},
        {"max_tokens_per_pass": 1},
        {"max_tokens_per_pass": 150},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_full_batches_give_the_same_steps_however_they_are_laid_out(setup, padded, settings):
    state, result = trained(setup, **settings)
    assert (result.tokens, result.answer_tokens) == (padded[1].tokens, padded[1].answer_tokens)
    for name, tensor in padded[0].items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


def test_checkpointing_recomputes_the_same_numbers(setup, padded):
    state, _ = trained(setup, gradient_checkpointing=True)
    for name, tensor in padded[0].items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-7)


def test_bfloat16_takes_nearly_the_same_steps(setup, padded):
    state, result = trained(setup, bf16=True)
    assert result.loss == pytest.approx(padded[1].loss, rel=1e-2)
    assert result.loss != padded[1].loss
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_every_row_is_packed_once_and_whole(setup):
    *_, encoded, _ = setup
    packs = pack(encoded, 200)
    rows = []
    for sequence in packs:
        batch = collate_packed([sequence])
        assert batch["attention_mask"].sum() <= 200
        for ids, mask, labels in zip(*batch.values(), strict=True):
            rows.append((ids[mask == 1].tolist(), labels[mask == 1].tolist()))
    assert sorted(rows) == sorted((row["input_ids"], row["labels"]) for row in encoded)
    assert len(packs) < len(encoded) / 2


def test_a_row_longer_than_the_sequence_stays_alone(setup):
    *_, encoded, _ = setup
    assert len(pack(encoded, 1)) == len(encoded)


def test_a_model_that_cannot_be_told_where_rows_begin_is_not_packed(setup):
    """BLOOM's attention has code of its own."""
    tokenizer = setup[0].tokenizer
    base = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=99))
    model = get_peft_model(base, LoraConfig())
    check_trainable(model, tokenizer, TrainArguments(), PrivacyArguments())
    with pytest.raises(ValueError, match="--packing: BloomForCausalLM cannot be told where rows"):
        check_trainable(model, tokenizer, TrainArguments(packing=True), PrivacyArguments())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_on_which_a_tokenizer_pads_changes_nothing(setup, padded, side):
    """On the left, passes of shorter rows once lost their last tokens, and with them answers."""
    tokenizer, before = setup[0].tokenizer, setup[0].tokenizer.padding_side
    tokenizer.padding_side = side
    state, result = trained(setup, max_tokens_per_pass=150)
    tokenizer.padding_side = before
    assert (result.tokens, result.answer_tokens) == (padded[1].tokens, padded[1].answer_tokens)
    for name, tensor in padded[0].items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": True}, "--fp16 needs a GPU"),
        ({"optim": "paged_adamw_8bit"}, "--optim paged_adamw_8bit needs a GPU"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_device(TrainArguments(**settings), "cpu")
    check_device(TrainArguments(**settings), "cuda")


def padded_batch(lengths):
    """A batch whose tokens say which row and place they are of; 0 is padding."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = 1000 * (row + 1) + torch.arange(length)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.clone()}


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=24),
    st.one_of(st.none(), st.integers(1, 400)),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([0, 10**6, 10**8, 10**10]),
)
def test_passes_hold_every_row_once_whole_and_within_the_limit(lengths, limit, device, size):
    batch = padded_batch(lengths)
    passes = passes_of(batch, limit, device=device, num_parameters=size)
    rows = [row[row > 0].tolist() for each in passes for row in each["input_ids"]]
    assert sorted(rows) == sorted(row[row > 0].tolist() for row in batch["input_ids"])
    for each in passes:
        assert each["input_ids"].shape == each["attention_mask"].shape == each["labels"].shape
        assert (each["labels"] == each["input_ids"]).all()
        assert each["attention_mask"][0].all()  # the longest row sets the width
        if limit is not None and len(each["input_ids"]) > 1:
            assert each["input_ids"].numel() <= limit


def test_what_all_rows_begin_with_counts_once_for_the_limit_of_a_pass():
    def number(limit, shared):
        size = {"device": "cuda", "num_parameters": 10**12}
        return len(passes_of(padded_batch([30] * 10), limit, shared=shared, **size))

    assert [number(limit, 25) for limit in (75, 74)] == [1, 2]  # 25 once, and 5 of each row
    assert [number(limit, 0) for limit in (300, 75)] == [1, 5]


def test_a_flat_batch_has_its_own_tokens_and_the_shared_ones():
    rows = [{"input_ids": [5] * 7 + [n] * n, "labels": [IGNORED] * 7 + [n] * n} for n in (2, 3)]
    assert num_tokens(collate(rows)) == 6 + 1 + 2 + 1 + 3


def test_passes_of_unlike_rows_are_hardly_padded():
    """Rows as long as those of real notes: at most a tenth of what is computed is padding."""
    lengths = [474, 310, 251, 198, 160, 141, 133, 124, 118, 113, 108, 101, 95, 90, 84, 77, 70, 61]
    passes = passes_of(padded_batch(lengths), None, device="cpu", num_parameters=135_000_000)
    computed = sum(each["input_ids"].numel() for each in passes)
    assert computed <= 1.1 * sum(lengths)
    assert len(lengths) * max(lengths) > 2 * sum(lengths)  # what one padded batch computes
    assert len(passes) < len(lengths)
    small = passes_of(padded_batch(lengths), None, device="cpu", num_parameters=10**6)
    assert len(small) < len(passes)  # where tokens are cheap, calls are what a pass costs


def test_a_federated_or_private_step_counts_tokens_once_whatever_the_passes(setup):
    _, whole = trained(setup)
    _, cut = trained(setup, max_tokens_per_pass=120)
    assert (cut.tokens, cut.answer_tokens) == (whole.tokens, whole.answer_tokens)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
