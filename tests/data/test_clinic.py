"""The bundled notes: seeded, balanced, different from clinic to clinic, honest about the test."""

from collections import Counter

import pytest

from fedfora.data.clinic import SPECIALTIES, clinic_rows


def test_the_same_rows_every_time():
    assert clinic_rows("train") == clinic_rows("train")


def test_splits_have_their_sizes_and_share_no_note():
    train, test = clinic_rows("train"), clinic_rows("test")
    assert (len(train), len(test)) == (2400, 240)
    assert not {r["input"] for r in train} & {r["input"] for r in test}


def test_specialties_are_balanced():
    assert set(Counter(r["specialty"] for r in clinic_rows("train")).values()) == {600}


def test_every_output_line_is_a_triple_of_words_that_stand_in_the_note():
    for row in clinic_rows("test"):
        for line in row["output"].split("\n"):
            head, _, tail = line.split("_")
            assert head.lower() in row["input"].lower()
            assert tail.lower() in row["input"].lower()


def test_no_relation_belongs_to_two_specialties():
    names = [relation.name for specialty in SPECIALTIES for relation in specialty.relations]
    assert len(names) == len(set(names)) == 12


def test_phrasings_use_both_fields_and_entities_have_no_underscore():
    for specialty in SPECIALTIES:
        for relation in specialty.relations:
            assert all("{head}" in p and "{tail}" in p for p in relation.phrasings)
        assert not any("_" in e for names in specialty.entities.values() for e in names)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, test"):
        clinic_rows("valid")
