"""Every command that the documentation shows as runnable runs.

Blocks fenced as `bash` are run, page by page, in an empty directory and in their order; those
fenced as `shell` need what a test has not: a GPU, a server, a network. In the same way those fenced
as `python` are run, with a tiny base in the directory MODEL, and those fenced as `py` are not.
The notebooks are run as well, cell by cell.
"""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fedfora.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]


def blocks_of(language):
    """Pages with blocks of that language to the blocks, in their order."""
    block = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {
        path.relative_to(ROOT).as_posix(): blocks
        for path in sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
        if (blocks := block.findall(path.read_text(encoding="utf-8")))
    }


PAGES, PYTHON = blocks_of("bash"), blocks_of("python")


@pytest.mark.filterwarnings("ignore")  # TRL 1.16 sets what transformers 5.24 has renamed
@pytest.mark.parametrize("page", PYTHON)
def test_every_python_block_of_the_page_runs(page, tmp_path, monkeypatch, tiny_dir):
    (tmp_path / "MODEL").symlink_to(tiny_dir, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in PYTHON[page]:
        exec(compile(block, page, "exec"), names)


NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_of_the_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)


def test_notebooks_are_kept_without_outputs_and_link_to_pages_that_are_there():
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
        for page in re.findall(
            r"\]\(([^)\s]+)\)", "".join(line for c in cells for line in c["source"])
        ):
            assert (path.parent / page).is_file(), page


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(page, tmp_path):
    shim = f'set -euo pipefail\nfedfora() {{ "{sys.executable}" -m fedfora "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-c", shim + "".join(PAGES[page])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def test_the_pages_that_promise_to_run_are_found():
    assert {"docs/index.md", "docs/own-data.md", "docs/simulate.md", "docs/serve.md"} <= set(PAGES)
    assert {"README.md", "docs/fora.md", "docs/own-trainer.md"} <= set(PYTHON)


def test_the_reference_knows_the_options_of_every_command():
    script = ROOT / "tools" / "docs_flags.py"
    if not script.is_file():
        pytest.skip("the documentation's tools are not beside the tests")
    tools = runpy.run_path(str(script))
    known = {name.split()[0] for name in tools["sections_of_commands"]()}
    assert known == set(COMMANDS) - {"info"}  # info takes no options


@pytest.mark.skipif(
    not (ROOT / "mkdocs.yml").is_file(), reason="the documentation is not beside the tests"
)
def test_the_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason='needs pip install "fedfora[docs]"')
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    flags = (tmp_path / "reference" / "flags.html").read_text(encoding="utf-8")
    for flag in ("--num_rounds", "--ori_model_dir", "--base_gguf", "--interval_s"):
        assert flag in flags
    assert "ForaConfig" in (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
