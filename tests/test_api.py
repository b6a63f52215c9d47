"""The commands as functions: the same bits, the same checks, nothing printed, rows from memory."""

import inspect
import json
import logging
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict

import fedfora
from fedfora.cli.main import main
from fedfora.data.clinic import clinic_rows

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def rows():
    by_clinic = {}
    for row in clinic_rows():
        by_clinic.setdefault(row["specialty"], []).append(dict(row))
    return [row for notes in by_clinic.values() for row in notes[:5]]


@pytest.fixture
def options(tiny_dir):
    return {
        "model": tiny_dir,
        "quantization": "none",
        "lora_rank": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }


@pytest.fixture
def training(options):
    return {**options, "max_steps": 2, "logging_steps": 1, "report_to": ["none"]}


@pytest.fixture
def federation(options):
    return {**options, "partition": "by-column:specialty", "num_rounds": 2, "local_steps": 1}


def typed(command, options):
    words = [command]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    assert main(words) == 0


def weights(directory):
    return (directory / ADAPTER).read_bytes()


def test_train_gives_the_commands_adapter_to_the_bit_from_a_file_a_list_and_a_dataset(
    training, rows, rows_file, tmp_path, capfd
):
    file = rows_file(rows)
    typed("train", {**training, "train_file": file, "output_dir": tmp_path / "typed"})
    capfd.readouterr()
    for name, given in {"file": file, "list": rows, "dataset": Dataset.from_list(rows)}.items():
        run = fedfora.train(**training, train_file=given, output_dir=tmp_path / name)
        assert weights(run.directory) == weights(tmp_path / "typed"), name
    assert capfd.readouterr() == ("", "")
    written = b"".join(path.read_bytes() for path in run.directory.rglob("*") if path.is_file())
    assert not [row["input"] for row in rows if row["input"].encode() in written]
    assert [line["step"] for line in run.history] == [1, 2]
    assert list(run.history.to_pandas()["loss"]) == [line["loss"] for line in run.history]
    assert run.report.is_file()
    shown = run._repr_html_()
    assert "Training of one adapter" in shown
    assert str(run.adapter) in shown


def test_simulate_gives_the_commands_adapter_to_the_bit_from_a_file_and_a_list(
    federation, rows, rows_file, tmp_path, capfd
):
    file = rows_file(rows)
    scoring = {"max_eval_samples": 2, "max_new_tokens": 3}
    typed(
        "simulate",
        {
            **federation,
            **scoring,
            "train_file": file,
            "test_file": file,
            "output_dir": tmp_path / "t",
        },
    )
    capfd.readouterr()
    for name, given in {"file": file, "list": rows}.items():
        fed = fedfora.simulate(
            **federation, **scoring, train_file=given, test_file=given, output_dir=tmp_path / name
        )
        assert weights(fed.directory) == weights(tmp_path / "t"), name
    assert capfd.readouterr() == ("", "")
    assert [line["round"] for line in fed.history] == [1, 2]
    assert fed.scores["rows"] == 2
    assert {len(lines) for lines in fed.sites.values()} == {2}
    assert list(fed.sites) == ["cardiology", "dermatology", "neurology", "gastroenterology"]
    assert "A federation of 4 sites" in fed._repr_html_()
    assert fed.best.adapter in (fed.adapter, fed.directory / "best")


def test_the_best_rounds_adapter_answers_beside_the_last_rounds(federation, rows, tmp_path):
    options = {**federation, "validation_fraction": 0.2, "learning_rate": 10.0}  # the first is best
    fed = fedfora.simulate(**options, train_file=rows, output_dir=tmp_path / "out")
    assert fed.best.adapter == tmp_path / "out" / "best"
    answered = [each.predict(rows[:1], max_new_tokens=2) for each in (fed, fed.best)]
    assert [each.adapter for each in answered] == [fed.adapter, fed.best.adapter]
    assert [each.directory.name for each in answered] == ["answers", "answers-best"]


def test_a_second_simulation_reads_its_rows_anew(federation, rows, rows_file, tmp_path):
    place = {"output_dir": tmp_path / "out", "overwrite_output_dir": True}
    first = weights(fedfora.simulate(**federation, **place, train_file=rows_file(rows)).adapter)
    changed = [{**row, "output": row["output"].upper()} for row in rows]
    second = weights(fedfora.simulate(**federation, **place, train_file=rows_file(changed)).adapter)
    third = weights(fedfora.simulate(**federation, **place, train_file=rows_file(rows)).adapter)
    assert first == third != second


def test_a_simulation_of_rows_in_memory_is_resumed_with_the_rows_again(
    federation, rows, tmp_path, monkeypatch
):
    from fedfora.federated.site_runtime import SiteRuntime

    train, trained = SiteRuntime.train, []
    whole = fedfora.simulate(**federation, train_file=rows, output_dir=tmp_path / "whole")

    def stop_in_the_second_round(self, *args, **options):
        trained.append(1)
        if len(trained) > 4:
            raise KeyboardInterrupt
        return train(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SiteRuntime, "train", stop_in_the_second_round)
        with pytest.raises(KeyboardInterrupt):
            fedfora.simulate(**federation, train_file=rows, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"these rows came from a Python program.*train_file=ROWS"):
        fedfora.simulate(resume=tmp_path / "out")
    resumed = fedfora.simulate(resume=tmp_path / "out", train_file=rows)
    assert weights(resumed.adapter) == weights(whole.adapter)
    assert {line["event"] for line in resumed.events} >= {"resumed"}


def test_a_trained_adapter_answers_is_loaded_and_exported(training, rows, tmp_path, capfd):
    run = fedfora.train(**training, train_file=rows, output_dir=tmp_path / "out")
    answers = run.predict(rows[:2], max_new_tokens=3)
    assert answers.directory == tmp_path / "out" / "answers"
    assert answers.adapter == run.adapter
    assert [row["reference"] for row in answers.predictions] == [r["output"] for r in rows[:2]]
    assert answers.scores["rows"] == 2
    assert "Predictions for 2 rows" in answers._repr_html_()
    exported = run.export(output_dir=tmp_path / "lora")
    config = json.loads((exported.directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "LoRA against FoRA" in exported.checks[0]
    assert "LoRA against FoRA" in exported._repr_html_()
    assert run.model.peft_config["default"].peft_type == "FORA"
    assert run.model is run.model
    assert run.tokenizer("a note")["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_progress_shows_the_steps(training, rows, tmp_path, capfd):
    out = tmp_path / "out"
    run = fedfora.train(**training, train_file=rows, output_dir=out, progress=True)
    assert "20 rows, 2 steps" in capfd.readouterr().out
    exported = run.export(output_dir=tmp_path / "lora", progress=True)
    lines = [*exported.checks, f"written: {tmp_path / 'lora'}"]
    assert capfd.readouterr().out.splitlines() == lines


def test_libraries_talk_as_before_afterwards(training, rows, tmp_path):
    from transformers.utils import logging as hf

    hf.set_verbosity_info()
    hf.enable_progress_bar()
    try:
        fedfora.train(**training, train_file=rows, output_dir=tmp_path / "out")
        assert hf.get_verbosity() == logging.INFO
        assert hf.is_progress_bar_enabled()
    finally:
        hf.set_verbosity_warning()


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        ("train", {"mdel": "x"}, "unknown option --mdel; did you mean --model?"),
        ("simulate", {"num_round": 3}, "did you mean --num_rounds?"),
        ("predict", {"model_dri": "x"}, "did you mean --model_dir?"),
        ("export", {"merge_int": "x"}, "did you mean --merge_into?"),
        ("train", {"help": True}, "unknown option --help; "),
        ("train", {"quantization": "nf5"}, "did you mean 'nf4'"),
        ("train", {"lora_rank": "two"}, "lora_rank.*'two'"),
        ("train", {"max_steps": 0}, "nothing to train"),
        ("train", {"model": None}, "--model_name_or_path is missing"),
        ("train", {"model": logging}, "--model cannot be a module"),
        ("train", {"train_file": DatasetDict()}, "--train_file cannot be a DatasetDict"),
        ("train", {"train_file": []}, "0 rows.*: no rows"),
        (
            "train",
            {"train_file": [{"input": "x", "output": "y"}, {"input": "x"}]},
            r'train_file in memory \(2 rows\), row 2: "output" is missing',
        ),
        ("train", {"train_file": ["x"]}, "row 1: expected an object with columns, got str"),
        ("simulate", {"robust": "krum"}, "invalid choice.*'krum'"),
        ("simulate", {"test_file": [{"input": "x"}], "num_clients": 1}, "test_file in memory"),
        ("predict", {"model_dir": "no-such"}, "no-such: not a directory"),
        ("export", {"model_dir": "no-such"}, "no-such: not a directory"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    function, wrong, message, tiny_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    usual = {"train": {"train_file": "clinic"}, "predict": {"test_file": "clinic:test"}}
    usual["simulate"] = usual["train"]
    with pytest.raises(ValueError, match=message):
        getattr(fedfora, function)(**{"model": tiny_dir, **usual.get(function, {}), **wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_is_refused_with_the_remedy(tiny_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    with pytest.raises(ValueError, match="a LlamaForCausalLM; save it and pass the directory"):
        fedfora.train(model=model, train_file="clinic")


def test_help_and_completion_know_every_option():
    for name in ("train", "predict", "simulate", "export"):
        known = inspect.signature(getattr(fedfora, name)).parameters
        assert {"progress", "model", "model_name_or_path", "output_dir"} <= set(known)
    assert known["format"].default == "lora"


def test_the_package_shows_its_public_names():
    names = {"train", "predict", "simulate", "export", "ForaConfig", "__version__"}
    assert names <= set(dir(fedfora))


SCRIPT = """
import sys
import fedfora
fedfora.train
assert fedfora.__version__[0].isdigit()
heavy = {"torch", "peft", "transformers", "datasets", "flwr", "pandas"} & set(sys.modules)
assert not heavy, heavy
rows = [{"input": letter, "output": letter} for letter in "abcd"]
run = fedfora.train(model="MODEL", train_file=rows, max_steps=1, output_dir="train")
run.predict(rows, max_new_tokens=2).model
run.export()
fedfora.simulate(
    model="MODEL", train_file=rows, num_clients=2, num_rounds=1, local_steps=1, output_dir="fed"
)
"""


def test_importing_is_light_and_a_fresh_process_says_nothing(tiny_dir, tmp_path):
    (tmp_path / "MODEL").symlink_to(tiny_dir, target_is_directory=True)
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flwr", "flwr_datasets", "cryptography"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import fedfora
for function in (fedfora.train, fedfora.simulate):
    try:
        function(mdel="clinic-base")
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_plain_installation_trains_and_names_the_extra_for_the_rest(tmp_path):
    words = [sys.executable, "-c", WITHOUT_EXTRAS]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "ConfigError unknown option --mdel; did you mean --model?",
        'ImportError cryptography is not installed: pip install "fedfora[federated]"',
    ], done.stderr
