"""Every mistake is one line that names it, found before any work starts; nothing is written."""

import dataclasses
import logging
import re
import subprocess
import sys

import pytest

from fedfora.cli.console import Once
from fedfora.cli.main import main


@pytest.fixture
def files(tmp_path, rows_file):
    good = {"instruction": "Extract:", "input": "x", "output": "a_b_c"}
    rows_file([good] * 4, "good.json")
    rows_file([{"instruction": "Extract:", "input": "x"}], "no_output.json")
    rows_file([{**good, "options": "A or B"}], "options.json")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "broken.json").write_text('{"input": "x", "output": "a_b_c"}\n{"input": \n')
    (tmp_path / "no_model").mkdir()
    for kind, name in (("adapter", "adapter_config"), ("model", "config"), ("run", "config")):
        (tmp_path / kind).mkdir()
        suffix = "yaml" if kind == "run" else "json"
        (tmp_path / kind / f"{name}.{suffix}").write_text("{}")
    return tmp_path


SIMULATE = "simulate --model_name_or_path clinic-base --output_dir {d}/out "
PREDICT = "predict --test_path clinic:test --output_dir {d}/out "
TRAIN = "train --model_name_or_path clinic-base --output_dir {d}/out "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("simulat", "unknown command 'simulat'; did you mean 'simulate'"),
        (SIMULATE + "--num_round 3", "did you mean --num_rounds"),
        (SIMULATE + "--lr 1e-3", "unknown option --lr; did you mean --learning_rate?"),
        (SIMULATE + "--train_file {d}/good.json --num_rounds 0", "--num_rounds must be at least 1"),
        (SIMULATE + "--train_file {d}/good.json --local_steps 0", "--local_steps must be at least"),
        (SIMULATE + "--train_file {d}/good.json --num_clients 5", "--num_clients 5: only 4 rows"),
        (SIMULATE + "--train_file {d}/good.json", "needs --num_clients"),
        (SIMULATE + "--num_clients 2", "--train_file is missing"),
        (
            SIMULATE + "--train_file {d}/good.json --num_clients 2 --clients_per_round 3",
            "--clients_per_round 3: only 2 sites",
        ),
        (SIMULATE + "--train_file {d}/empty.json --num_clients 1", "empty.json: no rows"),
        (SIMULATE + "--train_file {d}/broken.json --num_clients 1", "broken.json, line 2, column"),
        (SIMULATE + "--train_file clinic --partition by-column:ward", 'no column "ward"'),
        (SIMULATE + "--train_file clinic --aggregation fedavgg", "did you mean 'fedavg'"),
        (
            SIMULATE + "--train_file {d}/good.json --num_clients 2 --test_file {d}/no.json",
            "no such file",
        ),
        (TRAIN + "--train_file {d}/no_output.json", 'line 1: "output" is missing'),
        (TRAIN + "--train_file clinic --quantization nf5", "did you mean 'nf4'"),
        (TRAIN + "--train_file clinic --max_steps 0", "--max_steps must be positive"),
        (TRAIN + "--train_file clinic --lora_rank 0", "--lora_rank must be at least 1, got 0"),
        (TRAIN + "--batch_size 4", "did you mean --per_device_train_batch_size or --per_dev"),
        (TRAIN + "--zzz 4", "unknown option --zzz; fedfora train --help-all lists them all"),
        (TRAIN + "--quantization int4", "did you mean 'nf4'"),
        ("export --model_dir {d}/adapter --format ollama", "did you mean 'gguf'"),
        (
            TRAIN + "--train_file clinic --target_modules q_proj query",
            "--target_modules query: no layer of clinic-base is called that; there are down_proj, ",
        ),
        (
            "train --train_file clinic --output_dir {d}/out --model_name_or_path clinc-base",
            "--model_name_or_path clinc-base: no model there: no such directory; did you mean 'cl",
        ),
        (TRAIN + "--train_file {d}/good.json --prompt_column asked", 'no row has "asked"'),
        ("help simulat", "did you mean 'simulate'"),
        (TRAIN + "--train_file {d}/goood.json", "goood.json; did you mean 'good.json'?"),
        ("check {d}/goood.json", "goood.json; did you mean 'good.json'?"),
        (SIMULATE + "--train_file clinic --partition specialty", "mean by-column:specialty?"),
        (
            SIMULATE + "--train_file clinic --partition speciality",
            "'speciality' is not one of iid, by-column:COLUMN, dirichlet:COLUMN:ALPHA\n",
        ),
        ("export --model_dir {d}/nowhere", "--model_dir {d}/nowhere: not a directory"),
        ("coordinator start --kit {d}", "unknown word 'start' (known: run, journal)"),
        ("site jour --kit {d}", "unknown word 'jour'; did you mean 'journal'?"),
        ("provision {d}/no.yaml", "no.yaml cannot be read: No such file or directory\n"),
        ("check federation --kit {d} --own_trainer", "unknown option --own_trainer; fedfora che"),
        (
            "train --train_file clinic --output_dir {d}/out --model_name_or_path {d}/no_model",
            "holds no config.json",
        ),
        ("train --train_file clinic --output_dir {d}/out", "--model_name_or_path is missing"),
        ("train --output_dir {d}/good.json --train_file clinic", "good.json is not a directory"),
        (
            "predict --test_file clinic:test --model_dir {d}/no_model",
            "holds no adapter_config.json",
        ),
        ("predict --output_dir {d}/out", "--test_file is missing"),
        ("evaluate --predictions_file {d}/no.jsonl", "no such file"),
        (PREDICT + "--model_dir {d}/no_model", "holds no adapter_config.json"),
        (PREDICT + "--checkpoint_dir step-5", "--checkpoint_dir step-5: no directory with"),
        (PREDICT + "--ori_model_dir {d}/no_model", "holds no config.json"),
        (PREDICT + "--ori_model_dir {d}/nowhere/x", "no model there: no such directory"),
        (PREDICT + "--ori_model_dir {d}/adapter", "that is an adapter, not a base model"),
        (PREDICT + "--model_dir {d}/model", "for a base model use --model_name_or_path"),
        (
            "train --model_name_or_path clinic-base --train_file clinic --output_dir {d}/run",
            "holds another run: --overwrite_output_dir starts over, --resume_from_checkpoint last",
        ),
        (
            "simulate --model_name_or_path clinic-base --train_file clinic --num_clients 2 "
            "--output_dir {d}/run",
            "/run resumes it",
        ),
        (PREDICT, "--model_name_or_path is missing"),
        (PREDICT + "--temperature 0.5", "--temperature 0.5 has no effect without --do_sample"),
        (PREDICT + "--do_sample --top_p 1.5", "--top_p must be in (0, 1], got 1.5"),
        (PREDICT + "--padding_side right", "--padding_side left, or --per_device_eval_batch_siz"),
        (PREDICT + "--metrics tripels", "did you mean 'triples'"),
        (PREDICT + "--no_do_eval --no_predict_with_generate", "nothing to do"),
        (
            "predict --ori_model_dir clinic-base --test_path {d}/options.json --output_dir {d}/out",
            'row 1: "options" must be a list of at least two texts',
        ),
        (
            "predict --ori_model_dir clinic-base --test_path {d}/no_output.json --metrics choice "
            "--output_dir {d}/out",
            'neither options in the column "options" nor references',
        ),
        (
            "predict --ori_model_dir clinic-base --test_path {d}/no_output.json "
            "--no_predict_with_generate --output_dir {d}/out",
            'line 1: "output" is missing',
        ),
        (
            "predict --ori_model_dir clinic-base --test_path clinic:test "
            "--output_dir {d}/good.json/out",
            "good.json/out cannot be written",
        ),
        (
            "evaluate --predictions_file {d}/broken.json --prediction_column input "
            "--reference_column output",
            "broken.json, line 2, column 11: broken JSON",
        ),
        (
            "evaluate --predictions_file {d}/good.json --scores_file {d}/good.json",
            "good.json is the file of predictions",
        ),
        ("evaluate --predictions_file {d}/good.json", 'line 1: no "prediction" to score'),
        (
            "evaluate --predictions_file {d}/good.json --prediction_column output",
            'no "reference" to score; the row has: instruction, input, output (--reference_column)',
        ),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(words, message, files, capsys):
    before = sorted(files.iterdir())
    assert main(words.format(d=files).split()) == 2
    error = capsys.readouterr().err
    assert message.format(d=files) in error
    assert len(error.strip().split("\n")) == 1
    assert sorted(files.iterdir()) == before


def test_a_directory_that_is_no_data_set_is_told_in_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('{"input": \n')
    assert main((TRAIN.format(d=tmp_path) + "--train_file .").split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("fedfora train: error: .: no such file, and no data set could be")
    assert len(error.strip().split("\n")) == 1


def test_help_is_quick_because_it_loads_nothing_heavy():
    code = (
        "import sys; from fedfora.cli.main import main; main(['--help']); "
        "heavy = {'torch', 'peft', 'transformers', 'flwr', 'trl'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "simulate" in done.stdout


@pytest.mark.parametrize("words", [["--version"], ["-V"]])
def test_the_version_is_told(words, capsys):
    assert main(words) == 0
    assert re.fullmatch(r"fedfora \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_of_a_command_is_its_help(capsys):
    printed = []
    for words in (["help", "train"], ["train", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert main(["help"]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "simulate", "predict", "evaluate", "demo", "info"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--config" in capsys.readouterr().out or command in ("evaluate", "demo", "info")


def printed_help(capsys, *words):
    with pytest.raises(SystemExit):
        main(list(words))
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "simulate", "predict"])
def test_help_shows_the_options_that_are_often_used_and_names_the_list_of_all(command, capsys):
    short, whole = (printed_help(capsys, command, f"--help{kind}") for kind in ("", "-all"))
    options = [set(re.findall(r"^  --(?:\[no_\])?(\w+)", text, re.M)) for text in (short, whole)]
    assert options[0] < options[1]
    assert len(options[0]) <= 25 < len(options[1])
    assert {"output_dir", "model_name_or_path"} <= options[0]
    assert f"--help-all shows {len(options[1]) - len(options[0])} more options" in short


@pytest.mark.parametrize(
    ("command", "option"),
    [("simulate", "num_train_epochs"), ("simulate", "max_steps"), ("predict", "train_file")],
)
def test_an_option_without_effect_is_neither_offered_nor_taken(command, option, tmp_path, capsys):
    assert f"--{option}" not in printed_help(capsys, command, "--help-all")
    assert main([command, f"--{option}", "1", "--output_dir", str(tmp_path / "out")]) == 2
    assert f"--{option} has no effect in fedfora {command}" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(f"{option}: 1\n")
    assert main([command, "--config", str(tmp_path / "c.yaml")]) == 2
    assert f"--{option} has no effect in fedfora {command}" in capsys.readouterr().err


def test_help_is_in_groups_and_says_every_option_once(capsys):
    printed = printed_help(capsys, "simulate", "--help-all")
    from fedfora.federated.settings import NO_EFFECT, SECTIONS

    headings = [section.__doc__.split("\n")[0].rstrip(".") + ":" for section in SECTIONS.values()]
    places = [printed.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    for section in SECTIONS.values():
        for field in dataclasses.fields(section):
            times = int(field.name not in NO_EFFECT)
            assert len(re.findall(rf"^  --{field.name}[ ,\n]", printed, re.MULTILINE)) == times


def test_a_message_that_comes_again_is_shown_once():
    once = Once()
    first, again, other = (
        logging.LogRecord("fedfora", logging.WARNING, "", 0, "skipped %d", (n,), None)
        for n in (1, 1, 2)
    )
    assert [once.filter(record) for record in (first, again, other)] == [True, False, True]
