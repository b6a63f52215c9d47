"""`fedfora check data`: what is in a file, with line numbers, and what a training would take."""

import json
import logging
import re
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import LlamaConfig

from fedfora.cli.check import _print_row
from fedfora.cli.console import Once
from fedfora.cli.main import main
from fedfora.data.encoding import IGNORED
from fedfora.models import losses
from fedfora.models.adapter_base import add_adapter
from fedfora.models.batches import collate, shared_tokens
from fedfora.models.loading import load_base
from fedfora.models.losses import token_losses
from fedfora.models.memory_estimate import estimate_memory
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.training.packing import estimate_step, passes_of
from fedfora.training.settings import TrainArguments

ROW = {"instruction": "Extract:", "input": "one", "output": "a_b_c"}


def check(capsys, *words):
    status = main(["check", "data", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_everything_wrong_is_counted_and_placed(rows_file, capsys):
    rows = [ROW, {**ROW, "input": "two", "output": " "}, ROW, {"input": "three"}]
    path = rows_file([*rows, {"input": 4, "output": "x"}])
    test = rows_file([{**ROW, "output": "other"}, {**ROW, "input": "new"}], "test.json")
    status, out, error = check(capsys, path, "--test_file", test)
    assert status == 2
    assert "2 broken rows" in error
    for line in (
        f"{path}: 5 rows",
        "column 'output': in 4 rows",
        'line 4: "output" is missing',
        'line 5: "input" must be text, got int',
        f"empty answers: 1\n  {path}, line 2",
        f"duplicates: 1\n  {path}, line 3 says the same as {path}, line 1",
        f"too: 1\n  {path}, line 3 is {test}, line 1",
    ):
        assert line in out
    status, out, error = check(capsys, path, "--skip_bad_rows")
    assert (status, error) == (0, "")
    assert "broken rows: 2" in out


def test_no_terminal_obeys_what_stands_in_rows(rows_file, capsys):
    """In a column's name, in a finding, in a row as the model reads it, in an error, in a log."""
    strange = "\x1b]0;owned\x07\x1b[2J"
    path = rows_file([{**ROW, strange: "a"}, {strange: "no answer"}, {**ROW, "output": strange}])
    status, out, err = check(capsys, path)
    assert status == 2
    assert main(["train", "--train_file", path, "--model_name_or_path", "clinic-base"]) == 2
    err += capsys.readouterr().err
    row = {"input_ids": [0, 1], "labels": [IGNORED, 1]}
    decoded = SimpleNamespace(decode=lambda ids: f"Notes:\n{strange}")
    _print_row(row, decoded, "row 1", "plain")
    out += capsys.readouterr().out
    record = logging.LogRecord("x", logging.WARNING, "", 0, "skipped: %s", (strange,), None)
    assert Once().filter(record)
    assert "owned" in (text := out + err + record.getMessage())
    assert text.replace("\n", "").isprintable()


def test_with_a_model_lengths_a_row_memory_and_time_are_shown(
    rows_file, tiny_dir, capsys, monkeypatch
):
    path = rows_file([ROW, {**ROW, "output": "a_b_c\n" * 20}])
    limits = ("--max_target_length", "32", "--quantization", "none", "--device", "cpu")
    status, out, _ = check(capsys, path, "--model", tiny_dir, *limits)
    assert status == 0
    assert "rows truncated: 1 (50.0 %)" in out
    assert "loss on" in out
    assert "Extract:one\na_b_c</s>" in out
    assert "total" in out
    # Two rows are a step, and three epochs the default.
    assert re.search(r"training time: \d+:\d\d, 3 steps of [\d.e-]+ s\n", out)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    status, out, _ = check(capsys, path, "--model", tiny_dir, *limits)
    assert status == 0
    assert "training time: not measured, only 0.0 GiB are free" in out


def test_an_unknown_check_names_the_known_ones(capsys):
    assert main(["check", "dta", "x.json"]) == 2
    assert "did you mean 'data'" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_weights_are_counted_as_they_lie_in_memory(tiny_dir, quantization):
    settings = ModelArguments(model_name_or_path=tiny_dir, quantization=quantization, device="cpu")
    base = load_base(settings)
    measured = sum(p.numel() * p.element_size() for p in base.model.parameters())
    if quantization == "nf4":  # the scales lie beside the weights
        states = [m.weight.quant_state for m in base.model.modules() if hasattr(m, "quant_state")]
        measured += sum(s.absmax.numel() * 4 for s in states if s is not None)
    if quantization == "int8":  # one scale of float32 for each row
        linear = [m for m in base.model.modules() if type(m).__name__ == "Linear8bitLt"]
        measured += sum(4 * m.weight.shape[0] for m in linear)
    estimate = estimate_memory(settings, AdapterArguments(lora_rank=2), lengths=[8])
    assert estimate.base == measured
    model = add_adapter(base, AdapterArguments(lora_rank=2), seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (estimate.adapter_parameters, estimate.adapter) == (trained, 16 * trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("lengths", "shared", "answer"),
    [([100] * 4, 0, 30), ([300], 0, 299), ([100, 60, 90, 70], 25, 20), ([190, 60], 0, 50)],
)
def test_what_the_backward_pass_keeps_is_counted(tiny_dir, lengths, shared, answer, dtype):
    """Against the tensors that autograd really keeps on this machine."""
    settings = ModelArguments(tiny_dir, quantization="none", torch_dtype=dtype, device="cpu")
    adapter = AdapterArguments(lora_rank=8)
    model = add_adapter(load_base(settings), adapter, seed=0).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = [[1] * shared + [row + 2] * (n - shared) for row, n in enumerate(lengths)]
    answers = [[IGNORED] * (n - answer) + [3] * answer for n in lengths]
    batch = collate([{"input_ids": i, "labels": a} for i, a in zip(rows, answers, strict=True)])
    assert shared_tokens(batch) == shared
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        token_losses(model, batch)[0].mean()
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = estimate_memory(
        settings,
        adapter,
        lengths=lengths,
        shared=shared,
        answer_tokens=len(lengths) * answer,
    )
    logits_gradient = 4 * len(lengths) * answer * model.config.vocab_size
    assert estimate.activations - logits_gradient == pytest.approx(measured, rel=0.05)


def estimated(directory, **options):
    options = {"lengths": [64], "on_gpu": True} | options
    dtype = "auto" if options["on_gpu"] else "float32"
    settings = ModelArguments(str(directory), quantization="nf4", torch_dtype=dtype)
    return estimate_memory(settings, AdapterArguments(lora_rank=8), **options)


def test_a_large_model_is_estimated_from_its_configuration_alone(tmp_path):
    """Llama-2-7B's shape: 6.5 billion weights in 4 bits and the embeddings in bfloat16."""
    LlamaConfig().save_pretrained(tmp_path)
    plain, doubled = estimated(tmp_path, on_gpu=False), estimated(tmp_path)
    linear, embeddings = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096
    assert doubled.base == pytest.approx(linear * 0.516 + 2 * embeddings, rel=1e-3)
    assert plain.base == pytest.approx(linear * 0.5625 + 4 * embeddings, rel=1e-3)
    assert estimated(tmp_path, gradient_checkpointing=True).activations < doubled.activations / 3


def test_alibis_mask_is_part_of_the_estimate(tmp_path):
    """Of all that is kept only the mask grows with the square of the length."""
    square = {}
    for kind in ("alibi", "rope"):
        directory = tmp_path / kind
        directory.mkdir()
        config = {
            **{"model_type": "baichuan", "vocab_size": 128, "hidden_size": 64},
            **{"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"position_embedding": kind, "model_max_length": 512},
        }
        (directory / "config.json").write_text(json.dumps(config))
        short, long = (estimated(directory, lengths=[n]).activations for n in (256, 512))
        square[kind] = long - 2 * short
    short, long = (4 * n**2 * 2 for n in (256, 512))  # four heads, in bfloat16
    assert square["alibi"] - square["rope"] == long - 2 * short


def test_blocks_computed_anew_are_estimated_with_fused_attention(tiny_dir, monkeypatch):
    settings = ModelArguments(tiny_dir, quantization="none", torch_dtype="bfloat16", device="cpu")
    shape = {"lengths": [200] * 4, "gradient_checkpointing": True}
    estimate = estimate_memory(settings, AdapterArguments(lora_rank=2), **shape)
    monkeypatch.setattr(losses, "SHORT", 0)
    assert estimate == estimate_memory(settings, AdapterArguments(lora_rank=2), **shape)


def test_logits_are_estimated_where_there_are_answers(tmp_path):
    """Llama-2-7B's shape, a row of 474 tokens with an answer of 16."""
    LlamaConfig().save_pretrained(tmp_path)
    answers, every = (estimated(tmp_path, lengths=[474], answer_tokens=n) for n in (16, 474))
    logits = 458 * 32000 * 4  # of the tokens without a loss: one copy at least
    assert every.activations - answers.activations > logits


LENGTHS = [198, *[151, 130, 123, 96, 81, 77, 72, 68, 61, 60, 55, 52, 47, 41, 38, 33, 31, 29, 25]]


def step_of(directory, lengths=LENGTHS, **settings):
    """The estimate of a step on rows of these lengths, the last ten tokens of each its answer."""
    rows = [
        {"input_ids": [row] * n, "labels": [IGNORED] * (n - 10) + [1] * 10, "prompt_size": n - 10}
        for row, n in enumerate(lengths)
    ]
    train = TrainArguments(gradient_accumulation_steps=1, **settings)
    model = ModelArguments(str(directory), quantization="none", device="cpu")
    return estimate_step(model, AdapterArguments(lora_rank=2), train, rows)


def test_the_estimate_of_a_step_is_that_of_the_pass_that_costs_most(tiny_dir):
    """Against the cut that training makes, for a model whose calls cost nothing."""
    whole = {"per_device_train_batch_size": len(LENGTHS)}
    batch = {"attention_mask": torch.tensor([[1] * n + [0] * (198 - n) for n in LENGTHS])}
    for limit in (None, 300, 1):
        passes = passes_of(batch, limit, device="cpu", num_parameters=10**12, shared=0)
        lengths = max((each["attention_mask"].sum(dim=1) for each in passes), key=torch.sum)
        kept = {"optim": "sgd", "gradient_checkpointing": limit == 1}
        estimate, words = step_of(tiny_dir, max_tokens_per_pass=limit, **whole, **kept)
        assert words.endswith(f"up to {int(lengths.sum()):,} tokens at once")
        model = ModelArguments(tiny_dir, quantization="none", device="cpu")
        shape = {"lengths": lengths.tolist(), "answer_tokens": 10 * len(lengths)}
        assert estimate == estimate_memory(model, AdapterArguments(lora_rank=2), **shape, **kept)


def test_a_drawn_step_is_at_least_the_longest_row_and_at_most_the_whole_batch(tiny_dir):
    at_once = {}
    for size in (1, 4, len(LENGTHS)):
        _, words = step_of(tiny_dir, per_device_train_batch_size=size)
        at_once[size] = int(words.split()[-4])
    assert at_once[1] == 198
    assert min(at_once[4], at_once[len(LENGTHS)]) > 198
    assert max(at_once.values()) < 4 * 198
    _, words = step_of(tiny_dir, [25] * 2000 + [198] + [25] * 2000, per_device_train_batch_size=1)
    assert words.endswith("up to 198 tokens at once")  # drawn or not, each epoch has it


def test_a_packed_step_is_one_sequence_of_its_rows(tiny_dir):
    packed = {"packing": True, "packing_length": 200}
    _, words = step_of(tiny_dir, [66] * 20, per_device_train_batch_size=2, **packed)
    assert int(words.split()[-4]) == 2 * 3 * 66  # two sequences of three rows
