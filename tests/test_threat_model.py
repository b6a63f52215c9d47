"""The pages on security name a test for each claim: all are there, under these very names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "docs" / "threat-model.md"

pytestmark = pytest.mark.skipif(not MODEL.is_file(), reason="the docs are not beside the tests")


def defined():
    for path in (ROOT / "tests").rglob("test_*.py"):
        yield from re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "fewest"), [("threat-model", 40), ("data-protection", 8), ("clusters", 1)]
)
def test_every_test_that_a_page_names_exists(page, fewest):
    text = MODEL.with_name(f"{page}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > fewest
    assert sorted(named - set(defined())) == []


def test_every_row_of_a_table_of_claims_names_a_test():
    claims, inside = [], False
    for line in MODEL.read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and re.search(r"\btests?\b", line.split("|")[-2].lower()):
            inside = inside or not re.search(r"`test_", line)
        if not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            claims.append(line)
    headers = [line for line in claims if re.search(r"\| test", line)]
    rows = [line for line in claims if line not in headers]
    assert len(rows) > 25
    assert [row for row in rows if "`test_" not in row.split("|")[-2]] == []
