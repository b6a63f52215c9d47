"""Every command that the documentation shows as runnable runs.

Blocks fenced as `bash` are run, page by page, in an empty directory and in their order; those
fenced as `shell` need what a test has not: a GPU, a server, a network.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    path.relative_to(ROOT).as_posix(): blocks
    for path in sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    if (blocks := BLOCK.findall(path.read_text(encoding="utf-8")))
}


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
