"""Answers survive a kill at any byte."""

from pathlib import Path

import pytest

from fedfora.evaluation.output import Journal

BATCHES = [
    {3: {"prediction": "水温高\n\u2028x"}, 0: {"prediction": ""}},
    {1: {"prediction": "b", "likeliest": 1}},
    {2: {"prediction": "c"}},
]


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "partial.jsonl")
    for batch in BATCHES:
        journal.append(batch)
    return journal


def test_what_was_appended_is_read(journal):
    assert journal.read() == BATCHES[0] | BATCHES[1] | BATCHES[2]


def test_cut_at_any_byte_whole_batches_remain_and_work_goes_on(journal):
    raw = journal.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == ord("\n")]
    for cut in range(len(raw) + 1):
        journal.path.write_bytes(raw[:cut])
        whole = sum(end <= cut for end in ends)
        expected = {}
        for batch in BATCHES[:whole]:
            expected |= batch
        assert journal.read() == expected
        journal.append({9: {"prediction": "new"}})
        assert journal.read() == expected | {9: {"prediction": "new"}}


def test_no_file_is_no_answers(tmp_path):
    assert Journal(tmp_path / "none.jsonl").read() == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error():
    with pytest.raises(OSError, match="No space left"):
        Journal(Path("/dev/full")).append(BATCHES[0])
