"""Benchmarks run by hand, so nothing else would notice that a name they use has moved."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")])


@pytest.mark.skipif(not PROGRAMS, reason="the programs are not beside the tests")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_name_that_it_takes_from_the_package_is_there(program):
    for node in ast.walk(ast.parse(program.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fedfora"):
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.skipif(not PROGRAMS, reason="the programs are not beside the tests")
def test_the_script_for_a_gpu_runs_its_parts_and_says_at_once_where_there_is_none():
    program = [sys.executable, str(ROOT / "benchmarks/gpu.py")]
    chosen = ("equal", "baichuan2-7b:nf4")
    tiny = [*program, "--tiny", "--limit_s", "3000", "--parts", *chosen]
    lines = subprocess.run(tiny, check=True, capture_output=True, text=True).stdout.splitlines()
    results = {name: part for line in lines[1:] for name, part in json.loads(line).items()}
    assert results.keys() == set(chosen)
    assert all(part["ok"] for part in results.values())
    if not torch.cuda.is_available():
        refused = subprocess.run(program, capture_output=True, text=True)
        assert "There is no GPU here" in refused.stderr


@pytest.mark.skipif(not PROGRAMS, reason="the programs are not beside the tests")
def test_a_tiny_board_resumes_and_compares_its_arms(tmp_path):
    arms = ("alone", "core", "central")
    command = [sys.executable, str(ROOT / "benchmarks/board.py"), "--tiny"]
    command += ["--results_dir", str(tmp_path)]
    subprocess.run([*command, "--arms", "base-3"], check=True, capture_output=True)
    subprocess.run([*command, "--arms", "base-3", *arms], check=True, capture_output=True)
    lines = (tmp_path / "clinic.jsonl").read_text(encoding="utf-8").splitlines()
    cells = [json.loads(line) for line in lines]
    assert [cell["arm"] for cell in cells] == ["base-3", *arms]
    assert not cells[0]["trials"]
    trained = [*cells[1]["sites"].values(), *cells[2:]]
    assert len(trained) == 5  # three sites alone; the fourth is unseen
    assert all(len(figures["trials"]) == 1 for figures in trained)
    assert len({figures["trials"][0]["validation_loss"] for figures in trained}) == 5
    summary = subprocess.run([*command, "--summary"], check=True, capture_output=True).stdout
    differences = json.loads(summary)
    assert len(differences) == 6
    assert differences["central"]["interval"] == [0, 0]
