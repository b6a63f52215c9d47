"""What federating brings: every arm beside the federation, on all rows and each site's own kind."""

import json

import pytest

from fedfora.data.loading import load_examples
from fedfora.data.partition import JOINED, DataError, partition
from fedfora.evaluation.scores import score
from fedfora.federated.comparison import compare
from fedfora.metrics import Answer
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
    comparison = compare(few_steps(settings, compare=ARMS), View(1))
    sites = ["cardiology", "dermatology", "neurology", "gastroenterology"]
    assert [row.name for row in comparison.of("alone")] == sites
    assert [name for name, *_ in comparison.arms()] == [
        *("base", "alone_mean", "alone_worst", "federated", "central"),
    ]
    for row in comparison.rows:
        for site in sites:
            own = [
                Answer(prediction, example.output, prompt=example.prompt)
                for prediction, example in zip(row.predictions, comparison.examples, strict=True)
                if example.columns["specialty"] == site
            ]
            assert row.groups[site] == score(own, "triples").summary
    table = dict(comparison.own_kind())
    assert set(table) == set(sites)
    assert set(table["cardiology"]) == {"base", "alone", "federated", "central"}
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
        assert answer["prediction"] == comparison.federated.predictions[index]
        assert answer["site"] == comparison.examples[index].columns["specialty"]
        names = ("base", answer["site"], "central")
        assert answer["others"] == {
            row.kind: row.predictions[index] for row in comparison.rows if row.name in names
        }


def test_only_the_arms_asked_for_are_trained(settings):
    comparison = compare(
        few_steps(settings, compare="central", partition="iid", num_clients=2), View(1)
    )
    assert not comparison.of("base") + comparison.of("alone")
    assert comparison.own_kind() == []  # iid sites have no kind of their own
    assert [name for name, *_ in comparison.arms()] == ["federated", "central"]


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
