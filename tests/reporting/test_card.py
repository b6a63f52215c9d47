"""The card fits its schema whatever the run measured, and its totals are those of the record."""

import json
from importlib.resources import files

import pytest
import yaml

from fedfora.reporting.card import card_of, privacy_of
from fedfora.reporting.history import read_run
from rounds import round_line

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads(files("fedfora.reporting").joinpath("card.schema.json").read_text())

ROW = {
    "event": "row",
    "name": "federated",
    "kind": "federated",
    "scores": {"rows": 7, "f1": 0.9, "intervals": {"f1": [0.8, 0.95]}},
    "peak_memory_bytes": 5_000,
    "wall_seconds": 3.5,
}


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"event": "step", "step": 1, "loss": 2.0, "seconds": 1.0}],
        [round_line(1), round_line(2)],
        [round_line(1, epsilon=0.5, delta=1e-5), ROW],
        [round_line(1, privacy={"epsilon": 2.0})],
        [{**round_line(1), "sites": []}],
        [round_line(1), {"event": "finished", "peak_memory_bytes": 9, "wall_seconds": 2.0}],
    ],
)
def test_every_card_fits_the_schema(write_run, events):
    jsonschema.validate(card_of(read_run(write_run(events=events))), SCHEMA)


def test_the_schema_refuses_what_is_no_card(write_run):
    card = card_of(read_run(write_run()))
    for broken in ({**card, "format": 2}, {**card, "extra": 1}, {**card, "rows": [{}]}, {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_communication_is_the_sum_over_rounds_and_sites(write_run):
    federation = card_of(read_run(write_run()))["federation"]
    assert federation["sites"] == ["north", "south"]
    assert federation["uplink_bytes"] == 3 * 2 * 2048
    assert federation["downlink_bytes"] == 3 * 2 * 1024
    assert federation["uplink_bytes_per_round_and_site"] == 2048


def test_the_rows_are_those_of_the_comparison_or_the_last_evaluation(write_run):
    alone = card_of(read_run(write_run("alone")))["rows"]
    assert alone == [{"name": "federated", "kind": "federated", "scores": round_line(3)["scores"]}]
    compared = card_of(read_run(write_run("compared", events=[round_line(1), ROW])))["rows"]
    assert compared == [{key: value for key, value in ROW.items() if key != "event"}]
    base = {**ROW, "name": "base", "kind": "base"}
    going = card_of(read_run(write_run("going", events=[base, round_line(1)])))["rows"]
    assert [(row["kind"], row["scores"]) for row in going] == [
        ("base", base["scores"]),
        ("federated", round_line(1)["scores"]),
    ]


def test_privacy_is_what_the_last_round_says_and_none_is_called_none():
    rounds = [round_line(1, epsilon=0.5, delta=1e-5), round_line(2, epsilon=0.75, delta=1e-5)]
    spent = privacy_of(rounds)
    assert (spent["epsilon"], spent["delta"]) == (0.75, 1e-5)
    assert spent["statement"] == "Differentially private with epsilon = 0.75, delta = 1e-05."
    assert privacy_of([round_line(1)])["statement"].startswith("No differential privacy")


@pytest.mark.parametrize(("steps", "listed"), [(-1, "num_train_epochs"), (5, "max_steps")])
def test_the_training_lists_what_had_an_effect(write_run, steps, listed):
    directory = write_run()
    path = directory / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["train"] |= {"max_steps": steps, "num_train_epochs": 3.0}
    path.write_text(yaml.safe_dump(config))
    training = card_of(read_run(directory))["training"]
    assert {"max_steps", "num_train_epochs"} & set(training) == {listed}
