"""The recipe for public medical data, on made-up files of the same formats."""

import importlib.util
import json
from pathlib import Path

import pytest

from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.scores import kind_of
from fedfora.metrics.triples import parse_triples

PROGRAM = Path(__file__).parents[2] / "examples" / "medical" / "prepare.py"
pytestmark = pytest.mark.skipif(
    not PROGRAM.is_file(), reason="the examples are not beside the tests"
)

MADE_UP = {
    "ade": {
        "ADE-Corpus-V2/DRUG-AE.rel": (
            "11|Foo_1 gave a rash and cough.|rash|1|2|Foo_1|3|4\n"
            "11|Foo_1 gave a rash and cough.|cough|1|2|Foo_1|3|4\n"
            "12|Bar hurts.|pain|1|2|Bar|3|4\n"
        ),
        "ADE-Corpus-V2/DRUG-DOSE.rel": "12|Bar hurts.|5 mg|1|2|Bar|3|4\n",
    },
    "mts": {
        f"Main-Dataset/MTS-Dialog-{part}.csv": (
            "ID,section_header,section_text,dialogue\n"
            '0,GENHX,"Pain, old.","Doctor: Hi.\nPatient: Ow."\n'
        )
        for part in ("TrainingSet", "ValidationSet", "TestSet-1-MEDIQA-Chat-2023")
    },
    "pubmedqa": {
        "data/ori_pqal.json": json.dumps(
            {
                pmid: {
                    "QUESTION": "Q?",
                    "CONTEXTS": ["A.", "B."],
                    "final_decision": "no",
                    "YEAR": "1",
                }
                for pmid in ("1", "2")
            }
        ),
        "data/test_ground_truth.json": json.dumps({"2": "no"}),
    },
    "medquad": {
        f"{number}_{name}_QA/{number}.xml": (
            "<Document><QAPairs><QAPair><Question>What is it ?</Question><Answer>It is made up\n   "
            "for this test.</Answer></QAPair><QAPair><Question>And?</Question><Answer/></QAPair>"
            "</QAPairs></Document>"
        )
        for number, name in ((1, "CancerGov"), (2, "NIDDK"))
    },
}


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(prepare, name, directory):
    for path, text in MADE_UP[name].items():
        (directory / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / "source" / path).write_text(text, encoding="utf-8", newline="")
    output = directory / "rows"
    arguments = ["--source_dir", str(directory / "source"), "--output_dir", str(output)]
    prepare.main([name, *arguments, "--any_version"])
    files = [path for path in sorted(output.iterdir()) if path.stat().st_size]
    return [row for path in files for row in load_examples(str(path), DataArguments())]


def test_ade(prepare, tmp_path):
    rows = rows_of(prepare, "ade", tmp_path)
    assert kind_of([row.output for row in rows]) == "triples"
    triples = sorted(triple for row in rows for triple in parse_triples(row.output)[0])
    assert triples == [
        ("Bar", "adverse effect", "pain"),
        ("Bar", "dose", "5 mg"),
        ("Foo_1", "adverse effect", "cough"),
        ("Foo_1", "adverse effect", "rash"),
    ]
    assert {row.columns["era"] for row in rows} == {"era-1", "era-3"}


def test_mts(prepare, tmp_path):
    rows = rows_of(prepare, "mts", tmp_path)
    assert [(r.input, r.output) for r in rows] == [("Doctor: Hi.\nPatient: Ow.", "Pain, old.")] * 3


def test_pubmedqa(prepare, tmp_path):
    rows = rows_of(prepare, "pubmedqa", tmp_path)
    assert [(r.columns["pmid"], r.input, r.output) for r in rows] == [
        ("2", "Q?\nA.\nB.", "no"),
        ("1", "Q?\nA.\nB.", "no"),
    ]


def test_medquad_leaves_out_questions_without_answers(prepare, tmp_path):
    rows = rows_of(prepare, "medquad", tmp_path)
    assert {row.output for row in rows} == {"It is made up for this test."}
    assert sorted(row.columns["institute"] for row in rows) == ["CancerGov", "NIDDK"]


def test_other_files_than_those_of_the_commit_are_refused(prepare, tmp_path, capsys):
    rows_of(prepare, "pubmedqa", tmp_path)
    with pytest.raises(SystemExit):
        prepare.main(["pubmedqa", "--source_dir", str(tmp_path / "source")])
    assert "--any_version" in capsys.readouterr().err
