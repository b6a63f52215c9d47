"""What federating brings: every arm beside the federation, on all rows and each site's own kind."""

import json

import pytest

from fedfora.cli.simulate import table_of_arms
from fedfora.data.loading import load_examples
from fedfora.data.partition import JOINED, DataError, partition
from fedfora.evaluation.scores import score
from fedfora.federated.comparison import compare
from fedfora.federated.preflight import scored_rows
from fedfora.metrics import Answer
from fedfora.reporting.card import card_of
from fedfora.reporting.history import read_run
from fedfora.reporting.sections import own_kinds
from fedfora.reporting.view import View

ARMS = "base alone central"


def few_steps(settings, **more):
    return settings(
        test_file="clinic:test",
        max_eval_samples=24,
        max_new_tokens=12,
        num_rounds=1,
        eval_rounds=1,
        **more,
    )


def test_every_arm_is_scored_on_all_rows_and_on_each_sites_own_kind(settings, tmp_path):
    chosen = few_steps(settings, compare=ARMS)
    arms, examples = compare(chosen, View(1)), scored_rows(chosen)
    sites = ["cardiology", "dermatology", "neurology", "gastroenterology"]
    alone = [row for row in arms if row.kind == "alone"]
    assert [row.name for row in alone] == sites
    run = read_run(tmp_path / "out")
    table = {name: scores for name, scores, *_ in table_of_arms(card_of(run))}
    assert list(table) == ["base", "alone_mean", "alone_worst", "federated", "central"]
    assert table["alone_worst"]["f1"] == min(row.scores["f1"] for row in alone)
    assert table["alone_mean"]["recall"] == sum(row.scores["recall"] for row in alone) / 4
    for row in arms:
        for site in sites:
            own = [
                Answer(prediction, example.output, prompt=example.prompt)
                for prediction, example in zip(row.predictions, examples, strict=True)
                if example.columns["specialty"] == site
            ]
            assert row.groups[site] == score(own, "triples").summary
    own = own_kinds(run, card_of(run))
    assert set(own) == set(sites)
    assert own["cardiology"] == {
        row.kind: row.groups["cardiology"]["f1"]
        for row in arms
        if row.kind != "alone" or row.name == "cardiology"
    }
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    recorded = [json.loads(line) for line in lines if '"row"' in line]
    assert [row["kind"] for row in recorded] == ["base", "federated", *["alone"] * 4, "central"]
    assert all(set(row["groups"]) == set(sites) for row in recorded)
    events = [json.loads(line)["event"] for line in lines]
    assert events.index("row") < events.index("round")  # whoever watches sees the base's at once
    (played,) = [json.loads(line) for line in lines if '"event": "round"' in line]
    federated = recorded[1]["groups"]
    assert played["groups"] == {site: {"f1": federated[site]["f1"]} for site in sites}
    answers = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    for index, answer in enumerate(map(json.loads, answers)):
        (federated,) = (row for row in arms if row.kind == "federated")
        assert answer["prediction"] == federated.predictions[index]
        assert answer["site"] == examples[index].columns["specialty"]
        names = ("base", answer["site"], "central")
        assert answer["others"] == {
            row.kind: row.predictions[index] for row in arms if row.name in names
        }


def test_only_the_arms_asked_for_are_trained(settings, tmp_path):
    compare(few_steps(settings, compare="central", partition="iid", num_clients=2), View(1))
    run = read_run(tmp_path / "out")
    assert own_kinds(run, card_of(run)) == {}  # iid sites have no kind of their own
    assert [name for name, *_ in table_of_arms(card_of(run))] == ["federated", "central"]


def test_an_unknown_arm_and_missing_test_rows_are_refused(settings):
    with pytest.raises(ValueError, match="--compare: unknown arm 'alon'; did you mean 'alone'"):
        few_steps(settings, compare="alon")
    with pytest.raises(ValueError, match="it needs --test_file"):
        settings(compare="alone")


def test_small_sites_are_joined_and_no_row_is_lost():
    from fedfora.data.settings import DataArguments

    rows = load_examples("clinic", DataArguments())
    rows = [row for row in rows if row.columns["specialty"] == "cardiology"][:9] + [
        row for row in rows if row.columns["specialty"] in ("neurology", "dermatology")
    ][:3]
    whole = partition(rows, "by-column:specialty", num_clients=None, seed=1)
    joined = partition(rows, "by-column:specialty", num_clients=None, seed=1, min_rows=3)
    assert joined.pop("cardiology") == whole["cardiology"]
    assert sorted(joined[JOINED]) == [9, 10, 11]
    with pytest.raises(DataError, match=r"--min_rows_per_site 4: small sites has 3 rows .*9"):
        partition(rows, "by-column:specialty", num_clients=None, seed=1, min_rows=4)
    with pytest.raises(DataError, match="--min_rows_per_site 7"):
        partition(rows, "iid", num_clients=2, seed=1, min_rows=7)
