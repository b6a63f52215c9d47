"""`--dataset` in a dataset_info.json: file and columns found, mistakes named; rows in memory."""

import json

import pytest

from fedfora.data.loading import DataError, load_chosen
from fedfora.data.settings import DataArguments
from fedfora.data.sources import held_rows, rows_of

CATALOG = {
    "spo": {"file_name": "spo.json"},
    "talk": {
        "file_name": "talk.json",
        "columns": {"prompt": "todo", "query": "q", "response": "a", "history": "before"},
    },
    "other": {"file_name": "talk.json", "columns": {"system": "s"}},
    "chats": {"file_name": "talk.json", "formatting": "sharegpt"},
    "nothing": {"columns": {}},
    "empty": {"hf_hub_url": ""},
}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(CATALOG))
    (tmp_path / "spo.json").write_text('{"input": "x", "output": "y"}')
    row = {"todo": "t", "q": "x", "a": "y", "before": [["old q", "old a"]]}
    (tmp_path / "talk.json").write_text(json.dumps(row))
    return str(tmp_path)


def load(directory, name):
    settings = DataArguments(dataset_dir=directory, dataset=name)
    return load_chosen(None, settings, flag="--train_file")


def test_a_name_stands_for_a_file_and_its_columns(directory):
    (example,) = load(directory, "spo")
    assert (example.input, example.output) == ("x", "y")
    (example,) = load(directory, "talk")
    assert (example.instruction, example.input, example.output) == ("t", "x", "y")
    assert example.history == (("old q", "old a"),)


def test_a_file_wins(directory):
    settings = DataArguments(dataset_dir=directory, dataset="spo")
    assert len(load_chosen("clinic", settings, flag="--train_file")) == 2400


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tolk", "unknown data set 'tolk'; did you mean 'talk'"),
        ("other", r"columns \['system'\] are not supported"),
        ("chats", "formatting 'sharegpt' is not known"),
        ("nothing", "neither file_name nor hf_hub_url"),
        ("empty", "empty has neither file_name nor hf_hub_url"),
        (None, "--train_file is missing"),
    ],
)
def test_mistakes_are_named(directory, name, message):
    with pytest.raises(DataError, match=message):
        load(directory, name)


def test_a_missing_or_broken_catalog_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no dataset_info\.json there"):
        load(str(tmp_path), "spo")
    (tmp_path / "dataset_info.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"dataset_info\.json, line 1, column 7: broken JSON"):
        load(str(tmp_path), "spo")


def test_rows_in_memory_are_found_by_their_name_while_they_are_held():
    with held_rows("train_file", [{"input": "a"}]) as name:
        assert list(rows_of(name)) == [(f"{name}, row 1", {"input": "a"})]
        with (
            pytest.raises(DataError, match="still runs"),
            held_rows("train_file", [{"input": "b"}]),
        ):
            pass
        assert list(rows_of(name)) == [(f"{name}, row 1", {"input": "a"})]
    with pytest.raises(DataError, match="pass them again"):
        list(rows_of(name))
