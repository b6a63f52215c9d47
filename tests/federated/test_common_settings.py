"""No path travels, and nothing that travels can become one at a site."""

from dataclasses import fields
from typing import get_origin

import pytest

from fedfora.federated.common_settings import ADJUSTABLE, OWN, agreed_part, at_site, common_part
from fedfora.federated.settings import SECTIONS

# Flags that take any text and travel all the same: none of them is ever opened as a file.
TEXTS = {
    "task",
    "source_prefix",
    "instruction_column",
    "prompt_column",
    "response_column",
    "history_column",
    "target_modules",
}
FIELDS = {field.name: field for section in SECTIONS.values() for field in fields(section)}


def test_every_name_is_one_of_a_flag():
    assert set(FIELDS) >= OWN | ADJUSTABLE | TEXTS


def test_a_flag_that_takes_any_text_is_a_sites_own_or_known_to_be_harmless():
    free = {
        name
        for name, field in FIELDS.items()
        if "str" in str(field.type)
        and "Literal" not in str(field.type)
        and get_origin(field.type) is not dict
        and not field.metadata.get("choices")
    }
    assert free - OWN <= TEXTS


def test_what_a_site_sets_wins_and_what_is_its_own_does_not_travel():
    settings = {"num_rounds": 3, "train_file": "/data/of/the/coordinator", "lora_rank": 4}
    assert common_part(settings) == {"num_rounds": 3, "lora_rank": 4}
    merged = at_site(common_part(settings), {"train_file": "/rows", "prompt_column": "text"})
    assert merged == {
        "num_rounds": 3,
        "lora_rank": 4,
        "train_file": "/rows",
        "prompt_column": "text",
    }


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_coordinator_cannot_set_what_is_a_sites_own(name):
    for spelling in (name, name.replace("_", "-")):
        with pytest.raises(ValueError, match=spelling):
            at_site({spelling: "/etc/passwd"}, {})


def test_sites_with_other_files_and_columns_agree_on_the_rest():
    ours = {"num_rounds": 3, "train_file": "/a", "prompt_column": "x"}
    theirs = {"num_rounds": 3, "train_file": "/b", "prompt_column": "y"}
    assert agreed_part(ours) == agreed_part(theirs) == {"num_rounds": 3}
