"""A file appears whole or not at all, and in no other place than its own."""

import os

import pytest

from fedfora.files import write_atomically


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("options", [{}, {"mode": 0o600}, {"durable": True}])
def test_a_link_beside_a_file_leads_no_writing_elsewhere(tmp_path, link, options):
    """Where two accounts share a directory, one could let the other write over its own files."""
    rows, path = tmp_path / "rows.jsonl", tmp_path / "last-run.json"
    rows.write_text("rows")
    link(rows, tmp_path / ".last-run.json.tmp")
    write_atomically(path, "new", **options)
    assert rows.read_text() == "rows"
    assert path.read_text() == "new"
    assert not path.is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["last-run.json", "rows.jsonl"]


def test_rights_are_those_that_were_asked_for_whatever_lay_there(tmp_path):
    path = tmp_path / "key"
    (tmp_path / ".key.tmp").write_text("half of it")
    (tmp_path / ".key.tmp").chmod(0o666)
    write_atomically(path, "secret", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomically(path, "public", mode=0o644)
    assert path.stat().st_mode & 0o777 == 0o644
