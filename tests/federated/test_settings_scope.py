"""No path travels, and nothing that travels can become one at a site."""

from dataclasses import fields
from typing import get_origin

import pytest

from fedfora.config import ConfigError
from fedfora.federated.settings import SECTIONS, from_run_config
from fedfora.federated.settings_scope import (
    LOCAL_ONLY,
    SITE_MAY_OVERRIDE,
    agreed_part,
    at_site,
    common_part,
)

# Flags that take any text and travel all the same: none of them is ever opened as a file.
TEXTS = {
    "task",
    "source_prefix",
    "instruction_column",
    "prompt_column",
    "response_column",
    "history_column",
    "target_modules",
    # Names out of a list, and the coordinator's alone.
    "compare",
    "report_to",
}
FIELDS = {field.name: field for section in SECTIONS.values() for field in fields(section)}


def test_every_name_is_one_of_a_flag():
    assert set(FIELDS) >= LOCAL_ONLY | SITE_MAY_OVERRIDE | TEXTS


def test_a_flag_that_takes_any_text_is_a_sites_own_or_known_to_be_harmless():
    free = {
        name
        for name, field in FIELDS.items()
        if "str" in str(field.type)
        and "Literal" not in str(field.type)
        and get_origin(field.type) is not dict
        and not field.metadata.get("choices")
    }
    assert free - LOCAL_ONLY <= TEXTS


def test_what_a_site_sets_wins_and_what_is_its_own_does_not_travel():
    settings = {"num_rounds": 3, "train_file": "/data/of/the/coordinator", "lora_rank": 4}
    assert common_part(settings) == {"num_rounds": 3, "lora_rank": 4}
    own = {"train_file": "/rows", "prompt_column": "text", "privacy_unit": "record"}
    for sent in ({}, {"prompt_column": "x", "privacy_unit": "none"}, {"privacy-unit": "none"}):
        merged = at_site({**common_part(settings), **sent}, own)
        assert merged == {"num_rounds": 3, "lora_rank": 4, **own}


@pytest.mark.parametrize("name", sorted(LOCAL_ONLY))
def test_a_coordinator_cannot_set_what_is_a_sites_own(name):
    for spelling in (name, name.replace("_", "-")):
        with pytest.raises(ValueError, match=spelling):
            at_site({spelling: "/etc/passwd"}, {})


def test_sites_with_other_files_and_columns_agree_on_the_rest():
    ours = {"num_rounds": 3, "train_file": "/a", "prompt_column": "x"}
    theirs = {"num_rounds": 3, "train_file": "/b", "prompt_column": "y"}
    assert agreed_part(ours) == agreed_part(theirs) == {"num_rounds": 3}


ALIASES = {
    alias.removeprefix("--"): name
    for name in LOCAL_ONLY
    for alias in FIELDS[name].metadata.get("aliases", [])
}


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_a_coordinator_cannot_set_it_by_another_name_either(alias):
    from_run_config({alias: "clinic"})  # which a command line knows
    with pytest.raises(ValueError, match=alias):
        at_site({alias: "/etc/passwd"}, {ALIASES[alias]: "/own"})


@pytest.mark.parametrize("carrier", ["target_modules", "site_ranks", "source_prefix"])
@pytest.mark.parametrize("option", ["--privacy_dir=/tmp", "--model=/x", "--cache-dir=/x", "-h"])
def test_a_coordinator_cannot_hide_an_option_in_a_value(carrier, option):
    """A list travels as one text, and is taken apart at the site."""
    text = f"1 {option}" if carrier != "source_prefix" else option
    with pytest.raises(ConfigError, match="is an option, not a value"):
        from_run_config(at_site({carrier: text}, {"privacy_dir": "/own"}))


def test_a_coordinator_cannot_hide_an_option_in_a_name():
    for name in ("lora_rank=4 --cache_dir", "lora_rank=4", "-h", "lora_rank --cache_dir=/x"):
        with pytest.raises(ValueError, match="may not set"):
            at_site({name: "4"}, {})


def test_what_begins_with_a_dash_and_is_a_value_stays_one():
    for name, text in (("source_prefix", "- a list: "), ("source_prefix", "-3 degrees")):
        assert getattr(from_run_config({name: text}).data, name) == text
