"""Whatever is fed in: the right result, or one line that names the place; nothing is written.

The examples are drawn by hypothesis, the same ones in every run; a failing one is shown at its
smallest.
"""

import csv
import io
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedfora.cli.main import main
from fedfora.config import ConfigParser
from fedfora.data.encoding import encode_example, prompt_format_of
from fedfora.data.loading import Example, load_examples
from fedfora.data.settings import DataArguments
from fedfora.federated.settings import SECTIONS as SIMULATE
from fedfora.federated.settings import FederationSettings
from fedfora.models.resolve import model_path
from fedfora.training.settings import SECTIONS as TRAIN
from fedfora.training.settings import TrainSettings

FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ANY_TEXT = st.text(max_size=8) | st.sampled_from(
    ["\ud83d", "</s>", "<pad>", "9" * 5000, "[" * 9999, '"', "\f", "\x85", "\u2028", "\r", "\0"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ("instruction", "input", "output", "history", "other")
ROWS = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS) | ANY_TEXT, VALUES, max_size=4), max_size=3
)


def refused(capsys, words, *, naming):
    """Run a command; say whether it refused, in one line that names the place."""
    status, error = main(words), capsys.readouterr().err.strip()
    assert status in (0, 2), error
    if status == 2:
        assert len(error.splitlines()) == 1, error
        assert any(name in error for name in naming), error
    return status == 2


def attempt(call):
    """What a call returns, and the message with which it refused."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error) or "refused without a word"


# -- rows


@FEW
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), kind=st.integers(0, 2))
def test_rows_that_were_written_are_read_to_the_letter(tmp_path, rows, kind):
    rows = [(f"x{prompt}", answer) for prompt, answer in rows]
    objects = [{"input": prompt, "output": answer} for prompt, answer in rows]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("input", "output"), *rows])
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in objects)
    name, text = [
        ("rows.csv", table.getvalue()),
        ("rows.jsonl", lines),
        ("rows.json", json.dumps(objects, ensure_ascii=False, indent=1)),
    ][kind]
    (tmp_path / name).write_bytes(text.encode())
    read = load_examples(str(tmp_path / name), DataArguments())
    assert [(row.input, row.output) for row in read] == rows


def as_json(rows, *, lines):
    """JSON of rows that Python's own writer gives; what it refuses is written as text."""
    written = [json.dumps(row) for row in rows]
    return "\n".join(written) if lines else f"[{','.join(written)}]"


@FEW
@given(
    content=st.binary(max_size=40)
    | ANY_TEXT.map(lambda text: text.encode(errors="surrogatepass"))
    | ROWS.map(lambda rows: as_json(rows, lines=True).encode())
    | ROWS.map(lambda rows: as_json(rows, lines=False).encode()),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]),
    skip=st.booleans(),
)
@example(content=b'{"input": ' + b"9" * 5000 + b"}", suffix=".jsonl", skip=True)
@example(content=b"[" * 99_999, suffix=".jsonl", skip=True)
@example(content=b"[" * 99_999, suffix=".json", skip=False)
@example(content=b'input,output\n"' + b"long " * 40_000, suffix=".csv", skip=False)
def test_a_file_of_rows_is_read_or_refused(tmp_path, content, suffix, skip):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    chosen = DataArguments(skip_bad_rows=skip, history_column="history")
    examples, refusal = attempt(lambda: load_examples(str(path), chosen))
    assert (f"rows{suffix}" in refusal) == bool(refusal)
    for row in examples or ():
        text = row.prompt + (row.output or "") + "".join(map("".join, row.history))
        assert text.encode().decode() == text


@FEW
@given(rows=ROWS, kind=st.sampled_from(["auto", "choice", "triples"]))
def test_a_file_of_predictions_is_scored_or_refused(tmp_path, capsys, rows, kind):
    renamed = {"instruction": "prediction", "input": "reference", "other": "options"}
    rows = [{renamed.get(name, name): value for name, value in row.items()} for row in rows]
    (tmp_path / "rows.json").write_text(as_json(rows, lines=True))
    words = ["evaluate", "--predictions_file", str(tmp_path / "rows.json"), "--metrics", kind]
    refused(capsys, words, naming=["rows.json"])


@FEW
@given(content=VALUES.map(lambda value: json.dumps({"rows": value})) | ANY_TEXT)
def test_a_catalog_is_read_or_refused(tmp_path, capsys, content):
    (tmp_path / "dataset_info.json").write_text(content, errors="surrogatepass")
    words = ["check", "data", "--dataset", "rows", "--dataset_dir", str(tmp_path)]
    assert refused(capsys, words, naming=[str(tmp_path)])


# -- templates and control tokens

PIECES = ["{{", "}}", "{%", "%}", "messages", "for m in messages", "endfor", "m.content", " "]
PIECES += ["raise_exception('no')", "if", "endif", "1 // 0", "[0]", ".role", "{% endfor %}", "</s>"]
PIECES += ["{% for m in messages %}", "{{ m.content }}", "<user>", "| tojson", "range(3)"]


@cache
def tokenizer():
    made = AutoTokenizer.from_pretrained(model_path("clinic-base"))
    made.add_special_tokens({"extra_special_tokens": ["<user>", "<assistant>"]})
    return made


@FEW
@given(template=st.lists(st.sampled_from(PIECES), max_size=8).map("".join), history=st.booleans())
def test_a_template_renders_every_message_or_is_refused(template, history):
    tokenizer().chat_template = template
    data = DataArguments(template="chat", history_column="h" if history else None)
    row = Example("", "alpha", "omega", {}, (("beta", "gamma"),) if history else ())

    def rendered():
        layout = prompt_format_of(data, tokenizer())
        return tokenizer().decode(encode_example(row, tokenizer(), layout)["input_ids"])

    text, refusal = attempt(rendered)
    if refusal:
        assert "--template plain" in refusal
    else:
        assert all(
            said in text for said in ("alpha", "omega", *(t for h in row.history for t in h))
        )


FORGED = st.lists(st.sampled_from(["</s>", "<user>", "<assistant>", "<s>", "<"]) | TEXTS).map(
    "".join
)


@FEW
@given(prompt=FORGED, answer=FORGED, turn=FORGED, chat=st.booleans(), length=st.integers(2, 90))
def test_no_row_makes_a_control_token(prompt, answer, turn, chat, length):
    tokenizer().chat_template = "{% for m in messages %}<user>{{ m.content }}</s>{% endfor %}"
    control = {index for index, token in tokenizer().added_tokens_decoder.items() if token.special}
    data = DataArguments(
        template="chat" if chat else "plain", max_source_length=length, max_target_length=length
    )

    def framed(*texts):
        said, reply, asked = texts
        row = Example("", said, reply, {}, ((asked, asked),) if asked else ())
        ids = encode_example(row, tokenizer(), prompt_format_of(data, tokenizer()))["input_ids"]
        return [token for token in ids if token in control]

    count = len(framed(f"x{prompt}", answer, turn)), len(framed("x", "y", turn and "z"))
    assert count[0] <= count[1]  # long turns are left out with their frame
    assert count[0] >= len(framed("x", "y", ""))


# -- configurations

OPTIONS = sorted(
    {name for kind in (*TRAIN.values(), *SIMULATE.values()) for name in kind.__dataclass_fields__}
)


@FEW
@given(
    options=st.dictionaries(st.sampled_from(OPTIONS), VALUES, min_size=1, max_size=3),
    federation=st.booleans(),
)
def test_a_configuration_is_taken_or_refused(tmp_path, options, federation):
    sections, whole = (SIMULATE, FederationSettings) if federation else (TRAIN, TrainSettings)
    parser = ConfigParser(sections.values(), prog="fedfora")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8", errors="surrogatepass")
    chosen, refusal = attempt(lambda: whole(*parser.parse(["--config", str(path)])))
    if refusal:
        names = [*options, *(name.replace("_", "-") for name in options), "config.yaml"]
        assert any(name in refusal for name in names), refusal
        return
    taken = {name: v for section in sections for name, v in vars(getattr(chosen, section)).items()}
    for name, value in options.items():  # what was said is what is meant
        if name in taken and isinstance(taken[name], str):
            assert taken[name] == (str(value).lower() if isinstance(value, bool) else str(value))
        if name in taken and value is None:
            assert taken[name] is None


@pytest.mark.parametrize("name", ["lora_rank", "quantization", "seed", "template", "output_dir"])
def test_nothing_is_no_value_where_one_is_needed(tmp_path, name, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(f"{name}:\ntrain_file: clinic\nmodel_name_or_path: clinic-base\n")
    assert main(["train", "--config", str(path)]) == 2
    assert f"--{name}: nothing given" in capsys.readouterr().err


@FEW
@given(content=ANY_TEXT | st.text("[]{}:-!&*?|>\"' \nab1", max_size=30))
@example(content="!!bool x")
@example(content="!!timestamp x")
@example(content="2024-13-45")
@example(content="[" * 9999)
def test_a_file_of_any_text_is_a_configuration_or_refused(tmp_path, capsys, content):
    path = tmp_path / "strange.yaml"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    words = ["train", "--model_name_or_path", str(tmp_path / "none"), "--config", str(path)]
    assert refused(capsys, words, naming=["strange.yaml", "unknown option", "none", "--"])
    kits = tmp_path / "kits"
    assert refused(
        capsys, ["provision", str(path), "--output_dir", str(kits)], naming=["strange.yaml"]
    )
    assert not kits.exists()


@FEW
@given(
    content=VALUES.map(json.dumps) | ANY_TEXT | VALUES.map(lambda v: json.dumps({"event": v})),
    name=st.sampled_from(["metrics.jsonl", "config.yaml", "environment.json", "scores.json"]),
)
def test_a_strange_run_is_reported_or_refused(tmp_path, capsys, content, name):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (run / "config.yaml").write_text("train:\n  seed: 1\n")
    (run / "metrics.jsonl").write_text('{"event": "started", "steps": 1, "seconds": 0.0}\n')
    (run / name).write_text(content + "\n", encoding="utf-8", errors="surrogatepass")
    refused(capsys, ["report", str(run)], naming=[str(run)])


# -- directories that fedfora reads


@FEW
@given(
    name=st.sampled_from(["fedfora.json", "adapter_config.json"]),
    content=VALUES.map(lambda value: json.dumps({"prompts": value, "base": value}))
    | VALUES.map(json.dumps)
    | ANY_TEXT,
)
def test_a_strange_adapter_is_refused(tmp_path, capsys, name, content):
    adapter = tmp_path / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/no/base/here"}')
    (adapter / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    words = ["predict", "--model_dir", str(adapter), "--test_file", "clinic:test"]
    out = tmp_path / "out"
    assert refused(capsys, [*words, "--output_dir", str(out)], naming=["adapter", "/no/base", "--"])
    assert not out.exists()


@FEW
@given(
    content=VALUES.map(json.dumps) | VALUES.map(lambda v: json.dumps({"model_type": v})) | ANY_TEXT
)
def test_a_strange_base_is_refused(tmp_path, capsys, content):
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    words = ["check", "data", "clinic:test", "--model", str(base)]
    assert refused(capsys, words, naming=[str(base)])


@FEW
@given(
    key=st.sampled_from(["hidden_size", "num_attention_heads", "vocab_size", "rope_parameters"]),
    value=VALUES,
)
def test_a_base_of_strange_numbers_is_measured_or_refused(tmp_path, tiny_dir, capsys, key, value):
    base = tmp_path / "base"
    if not base.exists():
        shutil.copytree(tiny_dir, base, ignore=shutil.ignore_patterns("*.safetensors"))
        (tmp_path / "rows.json").write_text('{"input": "x", "output": "y"}')
    config = json.loads(Path(tiny_dir, "config.json").read_text()) | {key: value}
    (base / "config.json").write_text(json.dumps(config))
    words = ["check", "data", str(tmp_path / "rows.json"), "--model", str(base)]
    refused(capsys, words, naming=[str(base)])


@FEW
@given(content=st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_a_strange_tokenizer_is_refused(tmp_path, tiny_dir, capsys, content):
    base = tmp_path / "base"
    if not base.exists():
        shutil.copytree(tiny_dir, base, ignore=shutil.ignore_patterns("*.safetensors"))
    (base / "tokenizer.json").write_bytes(content)
    words = ["check", "data", "clinic:test", "--model", str(base)]
    assert refused(capsys, words, naming=[str(base)])
