"""A plain install trains, reports and exports; what needs an extra says which."""

import subprocess
import sys

import pytest

from fedfora.cli.main import main

WITHOUT_FLOWER = (
    "import sys; sys.modules['flwr'] = None; sys.modules['flwr_datasets'] = None; "
    "from fedfora.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def without_flower(words, tmp_path):
    command = [sys.executable, "-c", WITHOUT_FLOWER, *words.split()]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)


def test_training_and_its_report_need_no_flower(tmp_path):
    train = "train --model_name_or_path clinic-base --train_file clinic --max_steps 1"
    for words in (train, "report out", "watch out --once"):
        done = without_flower(words, tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_federation_without_flower_names_the_extra(tmp_path):
    done = without_flower(
        "simulate --model_name_or_path clinic-base --train_file clinic --num_clients 2", tmp_path
    )
    assert done.returncode == 2
    remedy = 'flwr is not installed: pip install "fedfora[federated]"'
    assert done.stderr.strip() == f"fedfora simulate: error: {remedy}"


@pytest.mark.parametrize(
    ("words", "extra"),
    [("simulate", "federated"), ("site", "federated"), ("keys --signing_key k", "privacy")],
)
def test_who_lacks_cryptography_is_told_the_extra_that_brings_all_the_rest(words, extra, tmp_path):
    code = f"import sys; sys.modules['cryptography'] = None; {WITHOUT_FLOWER}"
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert f'pip install "fedfora[{extra}]"' in done.stderr


def test_another_missing_module_is_no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "fedfora.config", raising=False)
    monkeypatch.delitem(sys.modules, "fedfora.cli.report", raising=False)
    with pytest.raises(ModuleNotFoundError, match="yaml"):
        main(["report", "nowhere"])
