"""The demo shows what it promises: the base knows nothing, federating brings what pooling would."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_demo_shows_what_federating_brings(tmp_path):
    command = [sys.executable, "-m", "fedfora", "demo", "--output_dir", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["base", "alone_mean", "alone_worst", "federated", "central"]
    f1 = {name: row["f1"] for name, row in rows.items()}
    assert f1["base"] <= 0.10
    assert f1["central"] >= 0.85
    assert f1["federated"] >= 0.95 * f1["central"]
    assert f1["alone_worst"] <= f1["alone_mean"] <= f1["federated"] - 0.15
    assert summary["uplink_bytes_per_round_and_site"] > 0
    assert summary["peak_memory_bytes"] > 0
    for what in ("alone, mean", "uplink per", "found", "Next:"):
        assert what in done.stdout
    assert (tmp_path / "demo" / "adapter_model.safetensors").is_file()
