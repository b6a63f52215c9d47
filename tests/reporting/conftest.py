"""Run directories as a federation would leave them, without running one."""

import json

import pytest
import yaml

from rounds import round_line


@pytest.fixture
def write_run(tmp_path):
    """A function that writes a run directory and returns its path."""

    def write(name="run", *, events=None, predictions=(), **environment):
        directory = tmp_path / name
        directory.mkdir()
        events = [round_line(n) for n in (1, 2, 3)] if events is None else events
        (directory / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        config = {
            "run": {"output_dir": str(directory)},
            "model": {"model_name_or_path": "clinic-base", "quantization": "nf4"},
            "adapter": {"lora_rank": 4, "lora_alpha": None},
            "data": {"train_file": "rows.json", "test_file": "test.json"},
            "train": {"learning_rate": 0.01},
            "federation": {"num_rounds": 3, "local_steps": 5, "aggregation": "fedavg"},
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        facts = {"seed": 42, "python": "3.11.7", "packages": {"torch": "2.13.0"}, **environment}
        (directory / "environment.json").write_text(json.dumps(facts))
        if predictions:
            lines = "".join(json.dumps(row) + "\n" for row in predictions)
            (directory / "predictions.jsonl").write_text(lines)
        return directory

    return write
