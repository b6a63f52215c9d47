"""Every row is read or named."""

import json

import pytest

from fedfora.data.loading import DataError, load_examples
from fedfora.data.settings import DataArguments

ROW = {"instruction": "Extract:", "input": "Öl läuft aus 机油", "output": "a_b_c"}


def load(path, **settings):
    return load_examples(str(path), DataArguments(**settings))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["lines.json", "lines.jsonl", "list.json", "table.csv"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    text = {
        "lines.json": json.dumps(ROW, ensure_ascii=False) + "\n\n" + json.dumps(ROW) + "\n",
        "lines.jsonl": json.dumps(ROW) + "\n" + json.dumps(ROW),
        "list.json": json.dumps([ROW, ROW], indent=1),
        "table.csv": "instruction,input,output\n" + "Extract:,Öl läuft aus 机油,a_b_c\n" * 2,
    }[name]
    examples = load(write(tmp_path / name, text))
    assert [e.columns for e in examples] == [ROW, ROW]
    assert examples[0].prompt == "Extract:Öl läuft aus 机油"


def test_a_byte_order_mark_and_unusual_line_separators_are_no_trouble(tmp_path):
    row = {**ROW, "input": "one\u2028two"}
    text = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\n"
    assert load(write(tmp_path / "bom.json", text))[0].input == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "x", "input": ', "line 2, column 31: broken JSON"),
        ('{"instruction": "x"}', 'line 2: "output" is missing.*--response_column'),
        ('{"output": "x", "text": "y"}', 'line 2: "instruction" and "input".*it|has: output, text'),
        ('{"input": 3, "output": "x"}', 'line 2: "input" must be text, got int'),
        ('["x"]', "line 2: expected an object"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "spo.json", json.dumps(ROW) + "\n" + line + "\n" + json.dumps(ROW))
    with pytest.raises(DataError, match=rf"spo\.json, {message}"):
        load(path)


def test_broken_rows_can_be_skipped_and_are_counted(tmp_path, caplog):
    path = write(tmp_path / "spo.json", json.dumps(ROW) + "\n{broken\n" + json.dumps(ROW))
    assert len(load(path, skip_bad_rows=True)) == 2
    assert "skipped 1 of 3 rows, first: " in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.json", "", "no rows"),
        ("blank.json", "\n\n", "no rows"),
        ("rows.txt", "x", "unknown format '.txt'"),
        ("list.json", '[{"input": "x",]', "line 1, column 16: broken JSON"),
    ],
)
def test_an_unusable_file_says_why(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / name, text))


def test_a_missing_file_names_the_bundled_ones():
    with pytest.raises(DataError, match=r"no such file: spo\.json.*clinic:test"):
        load("spo.json")


def test_not_utf8_is_said(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"input": "\xe4"}')
    with pytest.raises(DataError, match="not UTF-8 at byte 11"):
        load(tmp_path / "latin.json")


def test_rows_without_answers_are_read_where_none_are_needed(tmp_path):
    path = write(tmp_path / "test.json", '{"input": "x"}')
    assert load_examples(str(path), DataArguments(), answers_needed=False)[0].output is None


def test_parquet_and_a_directory_as_on_the_hub_give_the_same_rows(tmp_path, monkeypatch):
    import pandas

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    pandas.DataFrame([ROW, ROW]).to_parquet("rows.parquet")
    pandas.DataFrame([ROW, ROW]).to_parquet("owner/name/train.parquet")
    pandas.DataFrame([ROW]).to_parquet("owner/name/test.parquet")
    assert [e.columns for e in load("rows.parquet")] == [ROW, ROW]
    assert [e.columns for e in load("owner/name")] == [ROW, ROW]
    assert [e.columns for e in load("owner/name:test")] == [ROW]
    with pytest.raises(DataError, match="owner/name:dev: no such file, and no data set"):
        load("owner/name:dev")


def test_a_broken_parquet_file_says_so(tmp_path):
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
        load(write(tmp_path / "rows.parquet", "text"))


def test_a_task_brings_its_columns_and_what_to_do(tmp_path):
    path = write(tmp_path / "med.json", '{"input": "q", "answer_icliniq": "a", "better": "b"}')
    (example,) = load(path, task="medical-dialogue")
    assert example.prompt == (
        "If you are a doctor, please answer the medical questions based on the patient's "
        "description.\nq"
    )
    assert example.output == "a"
    (example,) = load(path, task="medical-dialogue", response_column="better")
    assert example.output == "b"
    own = write(tmp_path / "own.json", '{"instruction": "Do:", "input": "q", "output": "a"}')
    assert load(own, task="triples")[0].instruction == "Do:"  # the row's own words win


@pytest.mark.parametrize("turns", ['"text"', '[["q"]]', '[["q", 3]]', '[{"q": "a"}]'])
def test_a_history_that_is_none_is_named(tmp_path, turns):
    path = write(tmp_path / "talk.json", f'{{"input": "x", "output": "y", "h": {turns}}}')
    with pytest.raises(DataError, match=r'line 1: "h" must be a list of \[question, answer\]'):
        load(path, history_column="h")


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path / "med.json", '{"question": "q", "answer_icliniq": "a"}')
    (example,) = load(path, prompt_column="question", response_column="answer_icliniq")
    assert (example.prompt, example.output) == ("q", "a")


@pytest.mark.parametrize("option", ["instruction_column", "prompt_column"])
def test_a_column_that_was_named_and_is_in_no_row_is_told(tmp_path, option):
    path = write(tmp_path / "a.json", '{"instruction": "i", "input": "q", "output": "a"}')
    with pytest.raises(DataError, match=rf'no row has "asked".*instruction, input.*--{option}'):
        load(path, **{option: "asked"})
    row = '{"instruction": "i", "input": "q", "output": "a"}'
    path = write(tmp_path / "a.jsonl", row + "\n" + row.replace("{", '{"asked": "r", '))
    assert len(load(path, **{option: "asked"})) == 2  # one row has it


def rows_in(path, **settings):
    return [(example.input, example.output) for example in load(path, **settings)]


@pytest.mark.parametrize("character", ["\f", "\v", "\x1c", "\x85", "\u2028", "\0", "\r", "\r\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_csv_cell_holds_any_character(tmp_path, character, line_end):
    cell = f"war{character}farin"
    quoted = f'"{cell}"' if character.strip("\r\n") == "" else cell
    lines = ["input,output", f"{quoted},{quoted}"]
    path = tmp_path / "rows.csv"
    path.write_bytes((line_end.join([*lines, "next,row"]) + line_end).encode())
    assert rows_in(path) == [(cell, cell), ("next", "row")]


def test_a_csv_cell_may_be_long(tmp_path):
    cell = "warfarin 40 mg. " * 20_000
    assert rows_in(write(tmp_path / "rows.csv", f'input,output\n"{cell}",w\n')) == [(cell, "w")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("takes 40 mg, warfarin,drug", "line 3: 3 cells, the header has 2"),
        ("takes 40 mg", "line 3: 1 cell, the header has 2"),
    ],
)
def test_a_csv_row_of_another_width_is_broken(tmp_path, line, message):
    path = write(tmp_path / "rows.csv", f"input,output\na,b\n{line}\nc,d\n")
    with pytest.raises(DataError, match=message):
        load(path)
    assert rows_in(path, skip_bad_rows=True) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('input,output\na,b\n"open,b\nc,d\n', r"line 3: broken CSV: unexpected end of data"),
        ('input,output\n"a" b,c\n', "line 2: broken CSV"),
        ("input,output,output\na,b,c\n", "line 1: two columns are named 'output'"),
    ],
)
def test_a_csv_file_whose_rows_cannot_be_told_apart_is_refused(tmp_path, text, message):
    path = write(tmp_path / "rows.csv", text)
    for skip in (False, True):
        with pytest.raises(DataError, match=message):
            load(path, skip_bad_rows=skip)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"input": "cut \\ud83d", "output": "x"}', r'"input" holds half a character \(U\+D83D\)'),
        ('{"input": "x", "output": "cut \\ude00"}', r'"output" holds half a character \(U\+DE00\)'),
        ('{"input": "x", "output": "y", "more": ' + "[" * 9_999 + "]" * 9_999 + "}", "too deeply"),
        ('{"input": "x", "output": "y", "more": ' + "9" * 5_000 + "}", "more than 4,300 digits"),
    ],
    ids=["surrogate in prompt", "surrogate in answer", "nested", "huge number"],
)
def test_json_that_no_tokenizer_or_reader_takes_is_a_broken_row(tmp_path, broken, message):
    good = '{"input": "a", "output": "b"}'
    lines = write(tmp_path / "rows.jsonl", f"{good}\n{broken}\n{good}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2.*{message}"):
        load(lines)
    assert rows_in(lines, skip_bad_rows=True) == [("a", "b")] * 2
    listed = write(tmp_path / "list.json", f"[{good},\n{broken},\n{good}]")
    with pytest.raises(DataError, match=rf"list\.json, (line|row) 2.*{message}"):
        load(listed)


def test_half_a_character_in_a_history_is_named(tmp_path):
    row = '{"input": "x", "output": "y", "h": [["q", "\\ud83d"]]}'
    with pytest.raises(DataError, match='line 1: "h" holds half a character'):
        load(write(tmp_path / "talk.json", row), history_column="h")
