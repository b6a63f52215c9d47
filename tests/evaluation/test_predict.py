"""`fedfora predict`: the original's command, resumed runs, other and merged bases, bad input."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedfora.cli.main import main
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation import output as journal_module
from fedfora.models.resolve import model_path

FILES = {
    *("config.yaml", "environment.json", "metrics.jsonl", "card.json", "report.html"),
    *("predictions.jsonl", "scores.json"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A few steps of training on the bundled base: the answers look like answers."""
    directory = tmp_path_factory.mktemp("adapter") / "a"
    words = (
        "train --model_name_or_path clinic-base --quantization none --train_file clinic "
        "--max_steps 25 --learning_rate 1e-2 --per_device_train_batch_size 8 --lora_rank 4 "
        f"--gradient_accumulation_steps 1 --max_target_length 48 --output_dir {directory}"
    )
    assert main(words.split()) == 0
    return directory


@pytest.fixture
def predict(adapter, tmp_path):
    """A function that predicts eight rows into a directory and returns the exit status."""

    def run(name, *words, rows=8, model_dir=adapter):
        command = f"predict --test_file clinic:test --output_dir {tmp_path / name}"
        return main(
            [
                *command.split(),
                *(["--model_dir", str(model_dir)] if model_dir else []),
                *["--max_eval_samples", str(rows), "--per_device_eval_batch_size", "3"],
                *map(str, words),
            ]
        )

    return run


def rows_of(directory):
    return [json.loads(line) for line in (directory / "predictions.jsonl").open()]


def answers_of(directory):
    return [row["prediction"] for row in rows_of(directory)]


def test_the_originals_command_as_it_stands(adapter, tmp_path, rows_file):
    test = rows_file(
        [{"instruction": "List:", "input": f"note {i}", "output": "a_b_c"} for i in range(5)],
        "spo_1.json",
    )
    words = (
        f"predict --ori_model_dir clinic-base --model_dir {adapter} --test_path {test} "
        f"--output_dir {tmp_path / 'o'} --max_len 12 --max_src_len 512 --do_eval "
        "--predict_with_generate --padding_side left --per_device_eval_batch_size 8 "
        "--original_scores"
    )
    assert main(words.split()) == 0
    assert {path.name for path in (tmp_path / "o").iterdir()} == FILES
    rows = rows_of(tmp_path / "o")
    assert [row["input"] for row in rows] == [f"note {i}" for i in range(5)]
    assert all(set(row["scores"]) >= {"precision", "recall", "f1"} for row in rows)
    scores = json.loads((tmp_path / "o" / "scores.json").read_text())
    assert scores["rows"] == 5
    assert scores["metrics"] == "triples"
    assert "original_f1" in scores["intervals"]


def test_a_checkpoint_is_found_by_its_path_and_by_its_name(adapter, predict, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-5"
    shutil.copytree(adapter, checkpoint)
    (checkpoint / "fedfora.json").rename(tmp_path / "run" / "fedfora.json")
    assert predict("plain") == 0
    assert predict("path", "--checkpoint_dir", checkpoint, model_dir=None) == 0
    assert predict("name", "--checkpoint_dir", "checkpoint-5", model_dir=tmp_path / "run") == 0
    assert answers_of(tmp_path / "plain") == answers_of(tmp_path / "path")
    assert answers_of(tmp_path / "plain") == answers_of(tmp_path / "name")


def test_a_data_set_by_name_has_the_columns_its_catalog_gives(adapter, predict, tmp_path):
    notes = load_examples("clinic:test", DataArguments())[:3]
    named = [{"do": note.instruction, "q": note.input, "a": note.output} for note in notes]
    (tmp_path / "notes.json").write_text(json.dumps(named))
    columns = {"prompt": "do", "query": "q", "response": "a"}
    catalog = {"notes": {"file_name": "notes.json", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(catalog))
    words = f"predict --model_dir {adapter} --dataset_dir {tmp_path} --dataset notes --output_dir"
    assert main([*words.split(), str(tmp_path / "named")]) == 0
    assert predict("first", rows=3) == 0
    assert answers_of(tmp_path / "named") == answers_of(tmp_path / "first")
    scores = [json.loads((tmp_path / d / "scores.json").read_text()) for d in ("named", "first")]
    assert scores[0]["f1"] == scores[1]["f1"]


def test_evaluate_finds_the_scores_of_predict_again(predict, tmp_path):
    assert predict("p") == 0
    words = f"evaluate --predictions_file {tmp_path / 'p' / 'predictions.jsonl'} "
    assert main([*words.split(), "--scores_file", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == json.loads((tmp_path / "p" / "scores.json").read_text())


@pytest.mark.parametrize("stop_after", [0, 1, 2])
@pytest.mark.parametrize("decoding", [[], ["--do_sample", "--top_k", 5]])
def test_stopped_and_started_again_is_uninterrupted(
    predict, tmp_path, monkeypatch, stop_after, decoding
):
    assert predict("whole", *decoding) == 0
    append, calls = journal_module.Journal.append, []

    def stopping(journal, answers):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(answers)
        append(journal, answers)

    monkeypatch.setattr(journal_module.Journal, "append", stopping)
    assert predict("cut", *decoding) == 130
    assert not (tmp_path / "cut" / "predictions.jsonl").exists()
    answered = []

    def counting(journal, answers):
        answered.extend(answers)
        append(journal, answers)

    monkeypatch.setattr(journal_module.Journal, "append", counting)
    assert predict("cut", *decoding) == 0
    assert len(answered) == 8 - 3 * stop_after
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "predictions.partial.jsonl").exists()


def test_killed_and_started_again_is_uninterrupted(adapter, predict, tmp_path):
    assert predict("whole", "--per_device_eval_batch_size", 1, rows=16) == 0
    command = (
        f"predict --test_file clinic:test --model_dir {adapter} --output_dir {tmp_path / 'cut'} "
        "--max_eval_samples 16 --per_device_eval_batch_size 1"
    )
    process = subprocess.Popen([sys.executable, "-m", "fedfora", *command.split()])
    partial = tmp_path / "cut" / "predictions.partial.jsonl"
    while not (partial.exists() and partial.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "predictions.jsonl").exists()
    kept = len(partial.read_bytes().splitlines())
    assert 0 < kept < 16
    # Rows that do not fit into memory go on with another batch size, and say the same.
    assert predict("cut", "--per_device_eval_batch_size", 4, rows=16) == 0
    assert answers_of(tmp_path / "cut") == answers_of(tmp_path / "whole")


def test_the_same_command_again_does_nothing_and_any_other_is_refused(
    adapter, predict, tmp_path, capsys
):
    assert predict("p") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    assert predict("p") == 0
    assert predict("p", "--max_new_tokens", 3) == 2
    assert "holds another run (config.yaml)" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()} == before
    other = shutil.copytree(adapter, tmp_path / "other")
    assert predict("p", model_dir=other) == 2
    assert predict("p", "--max_new_tokens", 3, "--overwrite_output_dir") == 0
    assert predict("plain", "--max_new_tokens", 3) == 0
    assert answers_of(tmp_path / "p") == answers_of(tmp_path / "plain")


def test_an_adapter_trained_anew_is_another_run(adapter, predict, tmp_path):
    again = shutil.copytree(adapter, tmp_path / "again")
    assert predict("p", model_dir=again) == 0
    record = json.loads((again / "fedfora.json").read_text())
    record["prompts"]["source_prefix"] = "Now: "
    (again / "fedfora.json").write_text(json.dumps(record))
    assert predict("p", model_dir=again) == 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_answers_are_the_same(predict, tmp_path, quantization):
    assert predict("plain", "--quantization", quantization) == 0
    assert predict("merged", "--quantization", quantization, "--merge") == 0
    assert answers_of(tmp_path / "merged") == answers_of(tmp_path / "plain")


def test_the_base_is_held_as_in_training_unless_told_otherwise(predict, tmp_path, caplog):
    assert predict("as-trained") == 0
    assert not caplog.records
    assert "quantization: none" in (tmp_path / "as-trained" / "config.yaml").read_text()
    assert predict("nf4", "--quantization", "nf4") == 0
    assert "trained on its base in none, float32; here it is in nf4" in caplog.text


def test_prompts_are_as_in_training_unless_told_otherwise(predict, tmp_path, monkeypatch):
    from fedfora.evaluation import predict as module

    layouts = []
    encode = module.encode_prompts

    def spy(examples, tokenizer, prompt_format):
        layouts.append(prompt_format)
        return encode(examples, tokenizer, prompt_format)

    monkeypatch.setattr(module, "encode_prompts", spy)
    assert predict("p", rows=1) == 0
    assert predict("q", "--max_src_len", "512", "--source_prefix", "Now: ", rows=1) == 0
    assert (layouts[0].max_source_length, layouts[0].max_target_length) == (512, 48)
    assert (layouts[1].source_prefix, layouts[1].max_target_length) == ("Now: ", 48)


def test_a_base_without_the_trained_chat_template_is_refused(adapter, predict, tmp_path, capsys):
    other = shutil.copytree(adapter, tmp_path / "chat")
    record = json.loads((other / "fedfora.json").read_text())
    record["prompts"]["template"] = "chat"
    (other / "fedfora.json").write_text(json.dumps(record))
    assert predict("p", model_dir=other) == 2
    error = capsys.readouterr().err
    assert "has no chat template, and the adapter was trained with its base's" in error


def test_an_adapter_for_another_base_is_refused(adapter, predict, tmp_path, capsys):
    """Same shapes, same tokenizer, other weights: only the fingerprint can tell."""
    import torch

    source = model_path("clinic-base")
    other = tmp_path / "other-base"
    model = LlamaForCausalLM.from_pretrained(source)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(source).save_pretrained(other)
    for quantization in ("none", "nf4"):
        assert predict("p", "--ori_model_dir", other, "--quantization", quantization) == 2
        assert "is not the base that" in capsys.readouterr().err
    model = LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.01  # the sketch does not see this
    model.save_pretrained(other)
    assert predict("p", "--ori_model_dir", other) == 2
    assert not (tmp_path / "p").exists()


def test_a_base_without_tokenizer_is_refused(tmp_path, predict, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(model_path("clinic-base")) / name, tmp_path)
    assert predict("p", "--ori_model_dir", tmp_path) == 2
    assert "comes without a tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_text_longer_than_the_models_context_is_refused(tmp_path, predict, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_path("clinic-base"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    words = ["--ori_model_dir", tmp_path / "short", "--quantization", "none"]
    assert predict("p", *words, "--max_new_tokens", 60, model_dir=None) == 2
    error = capsys.readouterr().err
    assert "exceed the model's context 64" in error
    assert "row " in error
    assert not (tmp_path / "p").exists()
    assert predict("p", *words, "--max_src_len", 16, "--max_new_tokens", 4, model_dir=None) == 0


def test_rows_without_answers_are_answered_without_scores(adapter, tmp_path, rows_file, capsys):
    test = rows_file([{"input": "note 1"}, {"input": "note 2"}])
    words = f"predict --model_dir {adapter} --test_path {test} --max_len 4 --output_dir "
    assert main([*words.split(), str(tmp_path / "p")]) == 0
    assert "no references, so no scores" in capsys.readouterr().out
    rows = rows_of(tmp_path / "p")
    assert [row["reference"] for row in rows] == [None, None]
    assert all("scores" not in row for row in rows)
    assert not (tmp_path / "p" / "scores.json").exists()


def test_some_rows_without_answers_leave_the_others_scored(adapter, tmp_path, rows_file):
    test = rows_file([{"input": "note 1"}, {"input": "note 2", "output": "a_b_c"}])
    words = f"predict --model_dir {adapter} --test_path {test} --max_len 4 --output_dir "
    assert main([*words.split(), str(tmp_path / "p")]) == 0
    assert ["scores" in row for row in rows_of(tmp_path / "p")] == [False, True]
    assert json.loads((tmp_path / "p" / "scores.json").read_text())["rows"] == 1


def test_without_do_eval_nothing_is_scored(predict, tmp_path):
    assert predict("p", "--no_do_eval", rows=2) == 0
    assert not (tmp_path / "p" / "scores.json").exists()
    assert all("scores" not in row for row in rows_of(tmp_path / "p"))


def test_without_generation_the_loss_is_measured(predict, tmp_path, capsys):
    assert predict("p", "--no_predict_with_generate", "--padding_side", "right") == 0
    scores = json.loads((tmp_path / "p" / "scores.json").read_text())
    assert scores["rows"] == 8
    assert 0 < scores["loss"] < 5
    assert "perplexity" in capsys.readouterr().out
    assert not (tmp_path / "p" / "predictions.jsonl").exists()


def test_a_choice_is_scored_by_letter_and_by_likelihood(adapter, tmp_path, rows_file):
    rows = [
        {"input": "Which?", "output": "B", "options": {"A": "aspirin", "B": "heparin"}},
        {"input": "Whether?", "output": "no", "options": ["yes", "no", "perhaps"]},
    ]
    words = f"predict --model_dir {adapter} --test_path {rows_file(rows)} --max_len 3 "
    assert main([*words.split(), "--output_dir", str(tmp_path / "p")]) == 0
    first, second = rows_of(tmp_path / "p")
    assert first["options"] == ["A", "B"]
    assert len(second["log_probabilities"]) == 3
    best = max(second["log_probabilities"])
    assert second["likeliest"] == second["log_probabilities"].index(best)
    scores = json.loads((tmp_path / "p" / "scores.json").read_text())
    assert scores["metrics"] == "choice"
    right = (first["likeliest"] == 1) + (second["likeliest"] == 1)
    assert scores["likelihood_accuracy"] == right / 2
    again = f"evaluate --predictions_file {tmp_path / 'p' / 'predictions.jsonl'}"
    assert main([*again.split(), "--scores_file", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == scores


def test_a_full_disk_keeps_what_there_is_and_says_so(predict, tmp_path, monkeypatch, capsys):
    append, calls = journal_module.Journal.append, []

    def filling(journal, answers):
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(append(journal, answers))

    monkeypatch.setattr(journal_module.Journal, "append", filling)
    assert predict("p") == 2
    assert "No space left on device; the answers so far are kept" in capsys.readouterr().err
    monkeypatch.setattr(journal_module.Journal, "append", append)
    assert predict("p") == 0
    assert len(rows_of(tmp_path / "p")) == 8


def test_a_disk_too_full_is_refused_before_any_work(predict, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 1))
    assert predict("p") == 2
    assert "disk has 0 MiB left" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_read_only_directory_is_refused_before_any_work(predict, tmp_path, monkeypatch, capsys):
    # By what the system says: permissions alone would not stop a superuser's test.
    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert predict("p") == 2
    assert "Read-only file system" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
