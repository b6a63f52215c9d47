"""Which round was best, when to stop, and who judges."""

import json

import pytest

from fedfora.evaluation.scores import kind_of, score
from fedfora.federated.coordinator.checkpoint import (
    Selection,
    forget_halves,
    next_steps,
    remove,
    resume_hint,
)
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.metrics import Answer, headlines
from fedfora.reporting.view import View


def judge(values, *, lower_is_better=True):
    selection = Selection()
    for number, value in enumerate(values, start=1):
        selection = selection.judged(number, value, lower_is_better=lower_is_better)
    return selection


@pytest.mark.parametrize(
    ("values", "lower", "best", "waited"),
    [
        ([3.0, 2.0, 2.5, 2.5], True, 2, 2),
        ([0.1, 0.9, 0.9], False, 3, 1),  # of equals the later one, which is no better
        ([0.0, 0.0, 0.0], False, 0, 0),  # where nothing is right yet no round is the best
        ([0.0, 0.2, 0.0], False, 2, 1),
        ([0.0, 0.0], True, 2, 1),  # a loss may be 0
        ([5.0], True, 1, 0),
        ([1.0, 2.0, 0.5], True, 3, 0),
    ],
)
def test_the_best_round_and_the_wait_by_hand(values, lower, best, waited):
    selection = judge(values, lower_is_better=lower)
    assert (selection.best_round, selection.waited) == (best, waited)
    assert selection.is_over(waited + 1) is False
    assert selection.is_over(max(1, waited)) is (waited > 0)
    assert selection.is_over(None) is False


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ([Answer("a_r_b", "a_r_b"), Answer("x_r_b", "c_r_d")], "f1"),
        ([Answer("No", "no", options=("yes", "no"))], "accuracy"),
        ([Answer("rest for two days", "rest two days")], "rougeL"),
    ],
)
def test_a_round_is_judged_by_the_score_that_the_report_shows(answers, name):
    scores = score(
        answers, kind_of([a.reference for a in answers], with_options=bool(answers[0].options))
    )
    assert headlines(scores.summary)[0] == name
    assert scores.summary[name] > 0
    assert headlines({}) == []


def test_sites_judge_each_round_and_the_best_is_kept(settings, tmp_path):
    rounds = simulate(settings(num_rounds=4, validation_fraction=0.2, learning_rate=1e-2), View(1))
    losses = [r["received_validation_loss"] for r in rounds[1:]] + [rounds[-1]["validation_loss"]]
    best = min(range(4), key=losses.__getitem__) + 1
    said = json.loads((tmp_path / "out" / "best" / "round.json").read_text())
    assert said == {"round": best}
    assert all(site["validation_tokens"] > 0 for r in rounds for site in r["sites"])
    assert all(site["rows"] == 8 for r in rounds for site in r["sites"])  # of 10, 2 are kept back


def test_a_run_that_gets_no_better_stops_and_keeps_its_best(settings, tmp_path):
    """With learning rate 0 every round is as good as the first: two more, and it is over.

    Of equal rounds the last is the best.
    """
    flags = {"num_rounds": 9, "validation_fraction": 0.2, "early_stopping_patience": 2}
    rounds = simulate(settings(**flags, learning_rate=0.0), View(1))
    assert len(rounds) == 4  # rounds 1 to 3 are judged in rounds 2 to 4
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert "stopped_early" in [json.loads(line)["event"] for line in lines]
    assert json.loads((tmp_path / "out" / "best" / "round.json").read_text()) == {"round": 3}


def test_judging_changes_nothing_but_the_rows_trained_on(settings, tmp_path):
    """The same rows, judged by test rows or not at all: the same adapter."""
    import torch

    from fedfora.models.saving import read_adapter

    simulate(settings(output_dir=str(tmp_path / "plain")), View(1))
    flags = {"test_file": "clinic:test", "max_eval_samples": 4, "max_new_tokens": 3}
    simulate(settings(**flags, output_dir=str(tmp_path / "judged")), View(1))
    one, other = read_adapter(tmp_path / "plain"), read_adapter(tmp_path / "judged")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_rounds(tmp_path / "judged")[-1]["scores"]["f1"] == 0  # so no round is the best
    assert not (tmp_path / "judged" / "best").exists()
    assert not (tmp_path / "plain" / "best").exists()
    assert read_rounds(tmp_path / "plain")[0]["scores"] == {}


# What a federation says at its end, and when it is stopped.


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with two finished rounds."""
    for number in (1, 2):
        (tmp_path / f"round-{number:03d}").mkdir()
        (tmp_path / f"round-{number:03d}" / "state.json").write_text("{}")
    return tmp_path


def outcome_judge(run_dir, best):
    (run_dir / "best").mkdir()
    (run_dir / "best" / "round.json").write_text(json.dumps({"round": best}))


def test_nobody_judged(run_dir):
    lines = next_steps(run_dir)
    assert lines[0] == f"adapter of the last round: {run_dir}"
    assert f"chat --adapter {run_dir}" in lines[2]
    assert not any("best" in line for line in lines)


def test_an_earlier_round_was_better(run_dir):
    outcome_judge(run_dir, 1)
    lines = next_steps(run_dir)
    assert f"adapter of the best round, 1 of 2: {run_dir / 'best'}" in lines
    assert any(f"--model_dir {run_dir / 'best'} " in line for line in lines)


def test_the_last_round_was_the_best(run_dir):
    outcome_judge(run_dir, 2)
    lines = next_steps(run_dir)
    assert lines[0] == f"adapter of the last round, which is also the best: {run_dir}"
    assert any(line.endswith(f"chat --adapter {run_dir}") for line in lines)


def test_a_stopped_run_says_how_it_goes_on(run_dir, tmp_path_factory):
    assert resume_hint(run_dir).startswith("after round 2; ")
    assert f"--resume {run_dir} " in resume_hint(run_dir)
    assert resume_hint(tmp_path_factory.mktemp("empty")) == ""
    assert resume_hint(run_dir / "nowhere") == ""


@pytest.mark.parametrize("name", ["round-001", "best"])
def test_a_checkpoint_whose_removal_was_killed_is_gone_when_the_run_resumes(
    name, tmp_path, monkeypatch
):
    def killed(path):
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    (tmp_path / name).mkdir()
    for file in ("state.json", "adapter_model.safetensors"):
        (tmp_path / name / file).write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr("fedfora.federated.coordinator.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(tmp_path / name)
    forget_halves(tmp_path)
    assert list(tmp_path.iterdir()) == []
