"""Benchmarks run by hand, so nothing else would notice that a name they use has moved."""

import ast
import importlib
from pathlib import Path

import pytest

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
