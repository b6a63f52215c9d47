"""What the README points at is there, and the picture in it stays small."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text(encoding="utf-8"))
    own = [link for link in links if "://" not in link]
    assert len(own) > 20
    assert [link for link in own if not (ROOT / link).exists()] == []


def test_every_claim_beside_others_names_its_test():
    text = README.read_text(encoding="utf-8")
    table = text.split("## Comparison with others")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in table.split("\n") if line.startswith("| ")][1:]
    assert len(rows) > 10
    for ours in rows:
        assert "](tests/" in ours


def test_the_pictures_are_small():
    for picture in (ROOT / "docs" / "pictures").glob("*.png"):
        assert picture.stat().st_size < 200 * 1024


def test_the_tree_names_every_package():
    tree = README.read_text(encoding="utf-8").split("## The tree")[1]
    for package in sorted((ROOT / "src" / "fedfora").glob("*/__init__.py")):
        assert f"  {package.parent.name}/" in tree
