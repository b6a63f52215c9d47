"""1,441 real car-repair reports in Chinese go through train, simulate and predict unchanged."""

import json
import os
from pathlib import Path

import pytest

from fedfora.cli.main import main
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments

FILE = Path(
    os.environ.get("FEDFORA_SPO_FILE")
    or Path(__file__).parents[2] / "shared" / "data" / "spo_train.json"
)

pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason="spo_train.json is not here (set FEDFORA_SPO_FILE to its path)"
)

QUICK = (
    "--quantization none --lora_rank 2 --learning_rate 1e-2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1 --max_source_length 96 --max_target_length 48 "
)


def test_every_row_is_read_and_the_text_survives():
    examples = load_examples(str(FILE), DataArguments())
    assert len(examples) == 1441
    assert "文本：" in examples[0].prompt
    assert examples[0].output == "发动机_部件故障_水温高\n风扇_部件故障_低速转动"


def test_train_then_predict(tiny_dir, tmp_path):
    train = f"train --model_name_or_path {tiny_dir} --train_file {FILE} --max_steps 12 {QUICK}"
    assert main([*train.split(), "--output_dir", str(tmp_path / "a"), "--logging_steps", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    predict = f"predict --model_dir {tmp_path / 'a'} --test_path {FILE} --quantization none"
    options = f"--output_dir {tmp_path / 'p'} --max_eval_samples 5 --max_new_tokens 4"
    assert main([*predict.split(), *options.split()]) == 0
    rows = [json.loads(x) for x in (tmp_path / "p/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert rows[0]["reference"].startswith("发动机_部件故障")
    assert main(["evaluate", "--predictions_file", str(tmp_path / "p/predictions.jsonl")]) == 0


def test_three_sites(tiny_dir, tmp_path):
    words = f"simulate --model_name_or_path {tiny_dir} --train_file {FILE} --num_clients 3 {QUICK}"
    out = str(tmp_path / "s")
    assert (
        main([*words.split(), "--num_rounds", "3", "--local_steps", "4", "--output_dir", out]) == 0
    )
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["event"] == "round"]
    assert [len(r["sites"]) for r in rounds] == [3, 3, 3]
    assert sum(s["rows"] for s in rounds[0]["sites"]) == 1441
    assert rounds[-1]["loss"] < rounds[0]["loss"]
