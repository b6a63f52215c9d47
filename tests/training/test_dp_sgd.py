"""DP-SGD against references that know no hooks, no sampler and no noise."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from fedfora.adapter.state import read_state
from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.models.adapter_base import add_adapter
from fedfora.models.batches import collate
from fedfora.models.loading import load_base
from fedfora.models.losses import row_losses
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.privacy.clipping import SecretNoise
from fedfora.training.dp_sgd import (
    PoissonBatches,
    PrivateSteps,
    RecordPrivacy,
    check_gradients,
    per_example_gradients,
    self_test,
    write_private_gradient,
)
from fedfora.training.dp_sgd import (
    _pieces as pieces_of,
)
from fedfora.training.local import train_locally
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments

INFINITE = float("inf")
KEY = bytes(32)


@pytest.fixture(params=["none", "nf4"])
def workplace(tiny_dir, request):
    """A base, an adapter that is no longer fresh, and 12 rows with answers of one length."""
    base = load_base(ModelArguments(model_name_or_path=tiny_dir, quantization=request.param))
    model = add_adapter(base, AdapterArguments(lora_rank=3), seed=3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "fora_D" in name or "fora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    data = DataArguments(train_file="clinic")
    rows = load_examples("clinic", data)[:12]
    encoded = encode_examples(rows, base.tokenizer, prompt_format_of(data, base.tokenizer))
    return model, base.tokenizer, [_same_answer_length(row) for row in encoded]


def _same_answer_length(row, answer=6):
    prompt = sum(label == -100 for label in row["labels"])
    return {name: ids[: prompt + answer] for name, ids in row.items()}


def batch_of(tokenizer, rows):
    return dict(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)(rows))


def gradients_of(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_no_noise_and_no_clip_are_the_plain_gradient(workplace, batch_size):
    """Whatever the size of the pieces; the reference is autograd on the rows' mean loss."""
    model, tokenizer, encoded = workplace
    batch = batch_of(tokenizer, encoded)
    row_losses(model, batch).mean().backward()
    expected = gradients_of(model)
    write_private_gradient(
        model,
        batch,
        RecordPrivacy(0.0, INFINITE, expected_rows=12, num_rows=12),
        SecretNoise(),
        batch_size=batch_size,
    )
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_clipping_is_that_of_gradients_taken_one_by_one(workplace):
    model, tokenizer, encoded = workplace
    clipping_norm, expected = 0.05, {}
    for row in encoded[:5]:
        row_losses(model, batch_of(tokenizer, [row])).sum().backward()
        alone = gradients_of(model)
        norm = torch.cat([g.flatten() for g in alone.values()]).norm()
        assert norm > clipping_norm
        for name, gradient in alone.items():
            expected[name] = expected.get(name, 0) + gradient * clipping_norm / norm
    write_private_gradient(
        model,
        batch_of(tokenizer, encoded[:5]),
        RecordPrivacy(0.0, clipping_norm, expected_rows=4, num_rows=12),
        SecretNoise(),
        batch_size=3,
    )
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name] / 4, rtol=1e-3, atol=1e-7)


def test_noise_has_the_stated_size_whatever_the_sample(workplace):
    """z C / expected rows on every number, also where the sample is empty."""
    model, _tokenizer, _ = workplace
    privacy = RecordPrivacy(3.0, 0.5, expected_rows=4, num_rows=12)
    empty = collate([])
    write_private_gradient(model, empty, privacy, SecretNoise(KEY), batch_size=2)
    noise = torch.cat([g.flatten() for g in gradients_of(model).values()])
    assert float(noise.std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.05)


SPOILED = {
    "rows swapped": lambda found: {name: gradient.flip(0) for name, gradient in found.items()},
    "the second row twice": lambda found: {
        name: torch.cat([gradient[:1], 2 * gradient[1:]]) for name, gradient in found.items()
    },
    "one layer is no number": lambda found: {
        **found,
        (last := list(found)[-1]): torch.full_like(found[last], torch.nan),
    },
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_the_self_test_sees_a_gradient_that_is_not_the_examples_own(workplace, monkeypatch, spoil):
    model, tokenizer, encoded = workplace
    batch = batch_of(tokenizer, encoded[:2])
    assert check_gradients(model, batch) < 1e-4

    def spoiled(model, batch, **options):
        losses, gradients = per_example_gradients(model, batch, **options)
        return losses, spoil(gradients)

    monkeypatch.setattr("fedfora.training.dp_sgd.per_example_gradients", spoiled)
    with pytest.raises(ValueError, match="do not add up"):
        check_gradients(model, batch)


def train(workplace, privacy, **options):
    model, _tokenizer, encoded = workplace
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        **options,
    }
    before = read_state(model)
    result = train_locally(
        model,
        encoded,
        TrainArguments(**settings),
        stretch=StepWindow(first_step=0, num_steps=4, total_steps=4),
        seed=5,
        privacy=privacy,
    )
    after = read_state(model)
    with torch.no_grad():  # so that a second training starts where the first did
        from fedfora.adapter.state import write_state

        write_state(model, before)
    return after, result


@pytest.mark.parametrize(("processes", "deepspeed"), [(2, False), (1, True)])
def test_no_process_adds_noise_of_its_own_to_a_step_of_several(processes, deepspeed):
    """Whoever started them: a simulation knows nothing of launchers."""
    arguments = SimpleNamespace(world_size=processes)
    trainer = SimpleNamespace(args=arguments, is_deepspeed_enabled=deepspeed)
    with pytest.raises(ValueError, match="trains in one process, without DeepSpeed"):
        PrivateSteps(RecordPrivacy(1.0, 1.0, 4, 12), None).dataloader(trainer)


def test_training_with_whole_samples_no_noise_and_no_clip_is_plain_training(workplace):
    """Every row in every step and answers of one length: the mean over tokens is that over rows."""
    plain, _ = train(workplace, None, optim="sgd", learning_rate=0.5)
    private, result = train(
        workplace,
        RecordPrivacy(0.0, INFINITE, expected_rows=12, num_rows=12),
        optim="sgd",
        learning_rate=0.5,
    )
    assert result.steps == 4
    moved = 0.0
    for name in plain:
        torch.testing.assert_close(private[name], plain[name], rtol=1e-4, atol=1e-6)
        moved += float(plain[name].abs().sum()) if name.endswith(".E") else 0.0
    assert moved > 0


def test_the_runs_seed_repeats_neither_noise_nor_samples(workplace):
    privacy = RecordPrivacy(1.0, 1.0, expected_rows=6, num_rows=12)
    one, other = train(workplace, privacy)[0], train(workplace, privacy)[0]
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith(".E"))


def test_samples_differ_in_size_and_empty_ones_are_steps_too(workplace):
    privacy = RecordPrivacy(1.0, 1.0, expected_rows=0.6, num_rows=12)
    sizes = [len(rows) for rows in PoissonBatches(12, 0.05, 200, SecretNoise(KEY))]
    assert 0 in sizes
    assert len(set(sizes)) > 2
    after, result = train(workplace, privacy)
    assert result.steps == 4
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@pytest.mark.parametrize("workplace", ["none"], indirect=True)
def test_a_training_samples_at_the_rate_that_is_accounted(workplace, monkeypatch):
    drawn = []

    def noted(*how):
        drawn.append(how)
        return PoissonBatches(*how)

    monkeypatch.setattr("fedfora.training.dp_sgd.PoissonBatches", noted)
    train(workplace, RecordPrivacy(1.0, 1.0, expected_rows=3, num_rows=12))
    ((num_rows, rate, num_steps, _),) = drawn
    assert (num_rows, rate, num_steps) == (12, 3 / 12, 4)


@pytest.mark.parametrize("workplace", ["none"], indirect=True)
def test_a_training_on_no_rows_is_its_noise_alone(workplace):
    """What a site answers where its own rows bring the training down."""
    model, tokenizer, _ = workplace
    before, privacy = read_state(model), RecordPrivacy(3.0, 0.5, expected_rows=6, num_rows=12)
    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    after, result = train((model, tokenizer, []), privacy, warmup_ratio=0.0, **options)
    assert (result.steps, result.tokens) == (4, 0)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
    assert float(moved.std()) == pytest.approx(0.1 * 3.0 * 0.5 / 6 * 4**0.5, rel=0.05)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("workplace", ["none"], indirect=True)
def test_a_row_that_fails_counts_as_nothing(workplace, monkeypatch, place):
    """The steps are paid for: an error would tell that the row is there. The others count."""
    model, tokenizer, encoded = workplace
    privacy = RecordPrivacy(0.0, 1.0, expected_rows=4, num_rows=12)
    rows = [{**encoded[0], "input_ids": [*encoded[0]["input_ids"][:-1], last]} for last in range(4)]
    poison = rows[place]["input_ids"]

    def fails(model, batch, **options):
        for ids in batch["input_ids"]:
            if ids[: len(poison)].tolist() == poison:
                raise RuntimeError("this row is here")
        return per_example_gradients(model, batch, **options)

    def summed(rows):
        batch = batch_of(tokenizer, rows)
        write_private_gradient(model, batch, privacy, SecretNoise(), batch_size=4)
        return gradients_of(model)

    expected = summed(rows[:place] + rows[place + 1 :])
    monkeypatch.setattr("fedfora.training.dp_sgd.per_example_gradients", fails)
    for name, gradient in summed(rows).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    assert all(not gradient.any() for gradient in summed([rows[place]]).values())


def drop_half(model):
    """Let an adapter in training drop half of its inputs."""
    for layer in model.modules():
        if hasattr(layer, "fora_dropout"):
            layer.fora_dropout["default"] = torch.nn.Dropout(0.5)
    model.train()


@pytest.mark.parametrize("workplace", ["none"], indirect=True)
def test_the_self_test_sees_no_dropout_and_leaves_it_on(workplace):
    """Two passes drop other inputs: a training with dropout would be refused."""
    model, tokenizer, encoded = workplace
    drop_half(model)
    assert check_gradients(model, batch_of(tokenizer, encoded[:2])) < 1e-4
    assert model.training


@pytest.mark.parametrize("workplace", ["none"], indirect=True)
def test_masks_of_dropout_come_from_no_seed_that_is_known(workplace):
    """Without one row the others get other masks: to who can repeat those, it moves the sum by 3 C.

    To everybody else the masks are equally likely, so the sum loses that row's gradient alone.
    """
    model, tokenizer, encoded = workplace
    drop_half(model)

    def gradient():
        torch.manual_seed(5)  # as the Trainer does, with the run's seed and the round
        batch, privacy = batch_of(tokenizer, encoded[:4]), RecordPrivacy(0.0, 1.0, 4, 12)
        write_private_gradient(model, batch, privacy, SecretNoise(), batch_size=4)
        return torch.cat([found.flatten() for found in gradients_of(model).values()])

    assert not torch.equal(gradient(), gradient())


def test_gradients_of_single_rows_never_have_more_room_than_is_set_aside(workplace, monkeypatch):
    """Whoever asks: a site that shares noise asks for half of its rows at once."""
    model, tokenizer, encoded = workplace
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr("fedfora.training.dp_sgd.NUMBERS_AT_ONCE", 3 * trained + 1)
    sizes, original = [], per_example_gradients

    def noted(model, batch, **options):
        sizes.append(len(batch["input_ids"]))
        return original(model, batch, **options)

    monkeypatch.setattr("fedfora.training.dp_sgd.per_example_gradients", noted)
    privacy = RecordPrivacy(0.0, 1.0, expected_rows=12, num_rows=12)
    batch = batch_of(tokenizer, encoded)
    write_private_gradient(model, batch, privacy, SecretNoise(), batch_size=12)
    assert max(sizes) == 3


def test_the_self_test_has_no_record_in_it(workplace, monkeypatch):
    """It is given a model and the size of its vocabulary alone, and runs once for a model."""
    model, tokenizer, _ = workplace
    seen = []
    monkeypatch.setattr(
        "fedfora.training.dp_sgd.check_gradients", lambda model, batch: seen.append(batch)
    )
    self_test(model, len(tokenizer))
    self_test(model, len(tokenizer))
    (batch,) = seen
    assert batch["input_ids"].max() < len(tokenizer)
    train(workplace, RecordPrivacy(1.0, 1.0, expected_rows=6, num_rows=12))
    assert len(seen) == 1  # and a training looks at no row without noise


@pytest.mark.parametrize("workplace", ["none"], indirect=True)
def test_a_piece_of_a_width_has_one_shape_whatever_the_sample(workplace):
    """One row alone is worked through beside as many empty ones as it has others elsewhere.

    And never without padding, also where all rows fill a width: then attention drops its mask, and
    takes another kernel.
    """
    _, tokenizer, encoded = workplace
    full, narrow = (
        [{name: (3 * ids)[:width] for name, ids in row.items()} for row in encoded]
        for width in (32, 16)
    )
    pieces = [
        piece
        for rows in (encoded, encoded[:1], encoded[3:5], full[:4], full[:3], narrow, narrow[:1])
        for piece, _ in pieces_of(batch_of(tokenizer, rows), 4, 2048, 99)
    ]
    shapes = {piece["input_ids"].shape for piece in pieces}
    assert len(shapes) == len({width for _, width in shapes}) > 2
    assert all((piece["attention_mask"] == 0).any() for piece in pieces)


@pytest.mark.parametrize(("num_rows", "max_tokens"), [(30, 2048), (120, 2048), (120, 16384)])
def test_a_private_step_computes_little_besides_its_rows(num_rows, max_tokens):
    length_N = torch.randint(30, 200, (num_rows,), generator=torch.Generator().manual_seed(0))
    mask_NL = (torch.arange(200) < length_N[:, None]).long()
    batch = {"input_ids": mask_NL, "attention_mask": mask_NL, "labels": mask_NL}
    pieces = list(pieces_of(batch, num_rows, max_tokens, 99))
    assert sum(count for _, count in pieces) == num_rows
    computed = sum(piece["input_ids"].numel() for piece, _ in pieces)
    assert computed < 1.7 * mask_NL.sum()
    most = max(len(piece["input_ids"]) for piece, _ in pieces)
    assert (
        max(len(piece["input_ids"]) for piece, _ in pieces_of(batch, num_rows, max_tokens, 2))
        == 2
        <= most
    )


def test_a_rows_gradient_does_not_depend_on_the_others_in_bfloat16(workplace):
    """Without one row, be it the longest, the others' sum loses that row's gradient alone."""
    model, tokenizer, encoded = workplace
    seen = []

    def gradients(rows):
        seen.clear()
        for piece, num_rows in pieces_of(batch_of(tokenizer, rows), 4, 2048, 99):
            with torch.autocast("cpu", torch.bfloat16):
                _, found = per_example_gradients(model, piece)
            for i in range(num_rows):
                key = tuple(piece["input_ids"][i].tolist())
                seen.append((key, {name: grad[i] for name, grad in found.items()}))
        model.zero_grad()
        return dict(seen)

    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    whole = gradients(encoded)
    without = gradients([row for i, row in enumerate(encoded) if i != longest])
    assert len(whole) == len(without) + 1
    for key, found in without.items():
        for name, gradient in found.items():
            assert torch.equal(gradient, whole[key][name])
