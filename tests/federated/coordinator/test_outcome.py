"""What a federation says at its end, and when it is stopped."""

import json

import pytest

from fedfora.federated.coordinator.outcome import next_steps, resume_hint


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with two finished rounds."""
    for number in (1, 2):
        (tmp_path / f"round-{number:03d}").mkdir()
        (tmp_path / f"round-{number:03d}" / "state.json").write_text("{}")
    return tmp_path


def judge(run_dir, best):
    (run_dir / "best").mkdir()
    (run_dir / "best" / "round.json").write_text(json.dumps({"round": best}))


def test_nobody_judged(run_dir):
    lines = next_steps(run_dir)
    assert lines[0] == f"adapter of the last round: {run_dir}"
    assert f"chat --adapter {run_dir}" in lines[2]
    assert not any("best" in line for line in lines)


def test_an_earlier_round_was_better(run_dir):
    judge(run_dir, 1)
    lines = next_steps(run_dir)
    assert f"adapter of the best round, 1 of 2: {run_dir / 'best'}" in lines
    assert any(f"--model_dir {run_dir / 'best'} " in line for line in lines)


def test_the_last_round_was_the_best(run_dir):
    judge(run_dir, 2)
    lines = next_steps(run_dir)
    assert lines[0] == f"adapter of the last round, which is also the best: {run_dir}"
    assert any(line.endswith(f"chat --adapter {run_dir}") for line in lines)


def test_a_stopped_run_says_how_it_goes_on(run_dir, tmp_path_factory):
    assert resume_hint(run_dir).startswith("after round 2; ")
    assert f"--resume {run_dir} " in resume_hint(run_dir)
    assert resume_hint(tmp_path_factory.mktemp("empty")) == ""
    assert resume_hint(run_dir / "nowhere") == ""
