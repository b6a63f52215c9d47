"""Public medical data sets to rows of instruction, input and output, one JSON object a line.

    python examples/medical/prepare.py ade --output_dir out/medical
    python examples/medical/prepare.py mts --source_dir CLONE --output_dir out/medical

Without `--source_dir` the files are downloaded from GitHub at the commit named below. What they
hold is checked by its hash, so that everybody has the same rows; `--any_version` takes others.
Nothing of the data is part of fedfora: its licences are the data sets' own (`SOURCES`).
"""

import argparse
import csv
import hashlib
import io
import json
import re
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

Row = dict[str, Any]
Rows = dict[str, list[Row]]  # by split
Files = dict[str, bytes]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: repository, commit, files and their hash; licence and reader."""

    repository: str
    commit: str
    patterns: tuple[str, ...]
    sha256: str
    licence: str
    rows: Callable[[Files], Rows]


# Kinds of findings as hospital departments would divide them, by beginnings and parts of words.
KINDS = {
    "nerves": r"neur|seiz|enceph|psych|dyskin|akath|coma|headache|dizz|mening|epilep|stroke|cereb"
    r"|dyston|mani[ac]|depress|delir|hallucin|confus|convuls|paralys|tremor|ataxi|parkinson"
    r"|myoclon|dementia|optic|vis(?:ual|ion)|retin|cornea|glaucom|ocular|hearing|sedat|serotonin",
    "skin-blood": r"skin|cutane|rash|erupt|derm|erythem|necrolys|purpur|urticar|alopec|pemphi"
    r"|prurit|photosens|stevens|pigment|bullous|acne|psoria|exanthem|hypersens|allerg|anaphyl"
    r"|lupus|penia|anemi|agranulocyt|hemoly|marrow|leuk|lymphom|thromb|hemorr|bleed|eosinophil"
    r"|coagul|aplasia|methemoglob|hematom|neutrop|platelet",
    "organs": r"cardi|pulmon|ventric|pneumon|heart|hypotens|hypertens|respir|lung|dyspn|asthma"
    r"|infarct|arrhyth|coronary|bronch|pleur|alveol|angina|syncop|hepat|liver|renal|neph|kidney"
    r"|pancrea|colitis|jaundice|cholesta|bowel|gastr|ulcer|vomit|diarrh|nausea|abdom|intestin"
    r"|uremic",
}


def kind_of_finding(triples: list[str]) -> str:
    """Return `doses` where one is given, else the kind that most of the findings' words are of."""
    parts = [re.split(r"(?<!\\)_", triple) for triple in triples]
    if any(relation == "dose" for _, relation, _ in parts):
        return "doses"
    found = " ".join(finding for _, _, finding in parts).lower()
    counts = {kind: len(re.findall(words, found)) for kind, words in KINDS.items()}
    return max(counts, key=counts.__getitem__) if any(counts.values()) else "other"


def ade_rows(files: Files) -> Rows:
    """One row a sentence with all its triples; `era`: five ranges of PubMed ids, equally large."""
    sentences: dict[tuple[int, str], list[str]] = {}
    for name, relation in (("DRUG-AE.rel", "adverse effect"), ("DRUG-DOSE.rel", "dose")):
        for line in _named(files, name).decode("utf-8").splitlines():
            pmid, sentence, tail, _, _, drug, _, _ = line.split("|")
            triple = "_".join(part.replace("_", r"\_") for part in (drug, relation, tail))
            triples = sentences.setdefault((int(pmid), sentence), [])
            if triple not in triples:
                triples.append(triple)
    ordered = sorted(sentences.items(), key=lambda item: item[0])
    rows: Rows = {"train": [], "test": []}
    first: dict[int, int] = {}  # the sentences of an article stay in one era
    for index, ((pmid, sentence), triples) in enumerate(ordered):
        rows[_split(str(pmid))].append(
            {
                "instruction": 'Extract the triples of the relations "adverse effect" and "dose" '
                "from the sentence; write each as drug_relation_finding on a line of its own. "
                "Sentence: ",
                "input": sentence,
                "output": "\n".join(triples),
                "era": f"era-{1 + 5 * first.setdefault(pmid, index) // len(ordered)}",
                "kind": kind_of_finding(triples),
                "pmid": pmid,
            }
        )
    return rows


def mts_rows(files: Files) -> Rows:
    """One row a conversation; `section`: the part of the note that it becomes."""
    names = {"train": "TrainingSet", "validation": "ValidationSet", "test": "TestSet-1"}
    rows: Rows = {}
    for split, name in names.items():
        text = _named(files, name).decode("utf-8-sig")
        rows[split] = [
            {
                "instruction": "Summarize the conversation between doctor and patient as the "
                f"section {row['section_header']} of a clinical note.",
                "input": row["dialogue"],
                "output": row["section_text"],
                "section": row["section_header"],
            }
            for row in csv.DictReader(io.StringIO(text, newline=""))
        ]
    return rows


def pubmedqa_rows(files: Files) -> Rows:
    """One row a question with its abstract; the published test split."""
    tested = json.loads(_named(files, "test_ground_truth.json"))
    rows: Rows = {"train": [], "test": []}
    for pmid, entry in json.loads(_named(files, "ori_pqal.json")).items():
        rows["test" if pmid in tested else "train"].append(
            {
                "instruction": "Answer the question with yes, no or maybe, from the abstract.",
                "input": "\n".join([entry["QUESTION"], *entry["CONTEXTS"]]),
                "output": entry["final_decision"],
                "options": ["yes", "no", "maybe"],
                "year": entry["YEAR"],
                "pmid": pmid,
            }
        )
    return rows


def medquad_rows(files: Files) -> Rows:
    """One row a question whose answer has 20 to 800 characters; `institute`: who published it."""
    rows: Rows = {"train": [], "test": []}
    for name, content in sorted(files.items()):
        folder = PurePosixPath(name).parent.name
        for pair in ElementTree.fromstring(content).iter("QAPair"):
            question, answer = (
                " ".join((pair.findtext(part) or "").split()) for part in ("Question", "Answer")
            )
            if question and 20 <= len(answer) <= 800:
                rows[_split(name)].append(
                    {
                        "instruction": "Answer the medical question.",
                        "input": question,
                        "output": answer,
                        "institute": folder.split("_", 1)[-1].removesuffix("_QA"),
                    }
                )
    return rows


SOURCES = {
    "ade": Source(
        "trunghlt/AdverseDrugReaction",
        "2851af96e26050cf551a2e1f716ff861f7b1059b",
        ("ADE-Corpus-V2/*.rel",),
        "f2b600d0657c720ac19adf160f02516635cdcc9aa5dd1024bf6f737578f7c05b",
        "ADE corpus V2 (Gurulingappa et al. 2012): free for research",
        ade_rows,
    ),
    "mts": Source(
        "abachaa/MTS-Dialog",
        "3ff0801933608d6f570468c13125125fb5cabdea",
        tuple(
            f"Main-Dataset/MTS-Dialog-{part}.csv"
            for part in ("TrainingSet", "ValidationSet", "TestSet-1-MEDIQA-Chat-2023")
        ),
        "888de36a5e6b2da2c2ccb567df1d37b6df2a7c503874f2cbe04e52b630882a25",
        "MTS-Dialog (Ben Abacha et al. 2023): CC BY 4.0",
        mts_rows,
    ),
    "pubmedqa": Source(
        "pubmedqa/pubmedqa",
        "1cbae8e92f72f20c8d3747cbb3bf5bc53554d997",
        ("data/ori_pqal.json", "data/test_ground_truth.json"),
        "19075232ceceb96f47e7019a600769311d795d0da7e03216915f285ec6a332f6",
        "PubMedQA (Jin et al. 2019): MIT",
        pubmedqa_rows,
    ),
    "medquad": Source(
        "abachaa/MedQuAD",
        "577bd37b96c02d1833b2c9eed2de9f96964e96cb",
        ("[1-9]_*_QA/*.xml",),
        "0abe20e5f1e95d4c59bed6c1bc7c6f92e929f4fa63167cfa0a10e22bb5d64d35",
        "MedQuAD (Ben Abacha and Demner-Fushman 2019): CC BY 4.0",
        medquad_rows,
    ),
}


def _split(group: str) -> str:
    """Return the same split for all rows of a document, one of ten in the test split."""
    return "test" if hashlib.sha256(group.encode()).digest()[0] % 10 == 0 else "train"


def _named(files: Files, part: str) -> bytes:
    return next(content for name, content in files.items() if part in name)


def read(source: Source, directory: str | None) -> Files:
    """Return the data set's files by name, of a directory or of the commit's archive on GitHub.

    Raises:
        ValueError: If there are none.
    """
    files: Files = {}
    if directory is not None:
        root = Path(directory)
        paths = [path for pattern in source.patterns for path in root.glob(pattern)]
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    else:
        url = f"https://github.com/{source.repository}/archive/{source.commit}.zip"
        with urllib.request.urlopen(url) as answer:
            archive = zipfile.ZipFile(io.BytesIO(answer.read()))
        for entry in archive.namelist():
            name = entry.partition("/")[2]
            if any(PurePosixPath(name).match(pattern) for pattern in source.patterns):
                files[name] = archive.read(entry)
    if not files:
        raise ValueError(f"{directory}: no {' or '.join(source.patterns)}")
    return files


def digest(files: Files) -> str:
    """Return one hash of all names and contents."""
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def main(argv: list[str] | None = None) -> None:
    """Write a data set's splits to NAME_SPLIT.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--source_dir", help="a clone of the repository; else it is downloaded")
    parser.add_argument("--output_dir", default="out/medical")
    parser.add_argument("--any_version", action="store_true", help="take files of another hash")
    options = parser.parse_args(argv)
    source, output = SOURCES[options.name], Path(options.output_dir)
    try:
        files = read(source, options.source_dir)
    except (OSError, ValueError) as error:
        parser.error(f"{source.repository}: {error}")
    if digest(files) != source.sha256 and not options.any_version:
        parser.error(
            f"these are not the files of {source.repository} at {source.commit}: their hash is "
            f"{digest(files)}, not {source.sha256} (--any_version takes them)"
        )
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in source.rows(files).items():
        path = output / f"{options.name}_{split}.json"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(rows):,} rows")
    print(source.licence)


if __name__ == "__main__":
    main()
