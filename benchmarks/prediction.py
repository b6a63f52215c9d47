"""Prediction in batches against the original's way, one row at a time, on the same model and rows.

Both are greedy with a KV cache, in float32, in turns in one process; the answers must be equal.
`demo`: the bundled base with a briefly trained adapter, whose answers end by themselves. `merged`:
the same with the adapter inside the weights. `wide`: a Llama of hidden size 256 with random weights
and a fresh adapter, whose answers run to their limit. `demo_nf4`: the demo's on a 4-bit base.
`folded` is what folding the adapter's core for a batch saves, in batches of the first size.

With --before the whole command `fedfora predict` of two versions, in their own batches, with the
given adapter or one trained for some steps: rows per second of processor time, scoring included,
loading not.

    OMP_NUM_THREADS=1 python benchmarks/prediction.py
    OMP_NUM_THREADS=1 python benchmarks/prediction.py --before ../older/src --train_file \
        ade_train.json --test_file ade_test.json --model_name_or_path SMOLLM2
"""

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedfora.cli.console import silence_libraries
from fedfora.config import ConfigParser
from fedfora.data.encoding import encode_prompt, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.generate import generate
from fedfora.models.adapter_base import add_adapter, merge_adapter
from fedfora.models.loading import (
    Base,
    load_adapter,
    load_base,
)
from fedfora.models.resolve import model_path
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.reporting.view import View
from fedfora.training.run import train
from fedfora.training.settings import SECTIONS, TrainSettings
from memory import measured
from record import ratio_of_pairs, write

MAX_NEW_TOKENS = 48


def trained_adapter(directory: Path) -> Path:
    """Train an adapter on the bundled base until its answers look like answers."""
    words = (
        f"--model_name_or_path clinic-base --quantization none --train_file clinic --output_dir "
        f"{directory} --max_steps 60 --per_device_train_batch_size 8 --learning_rate 1e-2 "
        f"--gradient_accumulation_steps 1 --max_target_length {MAX_NEW_TOKENS}"
    )
    settings = TrainSettings(*ConfigParser(SECTIONS.values()).parse(words.split()))
    train(settings, View(1, Console(quiet=True)))
    return directory


def wide_base(directory: Path) -> Base:
    """Make a Llama of hidden size 256 with the bundled tokenizer and random weights."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("clinic-base"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load_base(ModelArguments(model_name_or_path=str(directory), quantization="none"))


def measure(
    model: Any, tokenizer: Any, num_rows: int, batch_sizes: list[int], pairs: int
) -> dict[str, Any]:
    """Return rows per second one by one and by batches, in turns, and whether the answers agree."""
    prompt_format = prompt_format_of(DataArguments(), tokenizer)
    examples = load_examples("clinic:test", DataArguments())[:num_rows]
    prompts = [encode_prompt(example, tokenizer, prompt_format) for example in examples]
    seconds: dict[int, list[float]] = {size: [] for size in (1, *batch_sizes)}
    answers: dict[int, list[str]] = {}
    generate(model, tokenizer, prompts[:2], max_new_tokens=4, batch_size=2)  # warm up
    unfolded: list[float] = []

    def timed(size: int) -> tuple[list[str], float]:
        started = time.perf_counter()
        found = generate(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=size)
        return found, time.perf_counter() - started

    for _ in range(pairs):
        for size in seconds:
            answers[size], took = timed(size)
            seconds[size].append(took)
        with patch("fedfora.evaluation.generate.folded_cores", lambda *_: nullcontext()):
            plain, took = timed(batch_sizes[0])
            unfolded.append(took)
    return {
        "rows": num_rows,
        "rows_per_s_one_by_one": num_rows / min(seconds[1]),
        "folded": {
            "faster": ratio_of_pairs(unfolded, seconds[batch_sizes[0]]),
            "equal_answers": sum(map(str.__eq__, plain, answers[batch_sizes[0]])) / num_rows,
        },
        "batches": {
            size: {
                "rows_per_s": num_rows / min(seconds[size]),
                "faster": ratio_of_pairs(seconds[1], seconds[size]),
                "equal_answers": sum(map(str.__eq__, answers[1], answers[size])) / num_rows,
            }
            for size in batch_sizes
        },
    }


def versions(options: argparse.Namespace) -> dict[str, Any]:
    """Return rows per second of `fedfora predict`, before and now, in turns, and equal answers."""
    model = f"--model_name_or_path {options.model_name_or_path} --quantization none"
    train = (
        f"-m fedfora train {model} --train_file {options.train_file} --max_steps {options.steps} "
        f"--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --learning_rate "
        f"{options.learning_rate} --torch_dtype float32"
    )
    arms = {"before": "float32", "now": "float32", "now_in_bfloat16": "bfloat16"}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    answers: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        adapter = options.adapter or f"{place}/out"
        if not options.adapter:
            measured([*train.split(), "--output_dir", adapter], Path(place), options.before)
        for _ in range(options.pairs):
            for arm, dtype in arms.items():
                with tempfile.TemporaryDirectory() as directory:
                    predict = (
                        f"-m fedfora predict {model} --torch_dtype {dtype} --test_file "
                        f"{options.test_file} --max_eval_samples {options.rows} --model_dir "
                        f"{adapter} --output_dir {directory}/out --max_target_length 64"
                    )
                    source = options.before if arm == "before" else None
                    figures = measured(predict.split(), Path(directory), source)
                    lines = (Path(directory) / "out" / "predictions.jsonl").read_text()
                answers[arm] = [json.loads(line)["prediction"] for line in lines.splitlines()]
                done = next(line for line in figures.pop("lines") if line["event"] == "predicted")
                seconds = done["cpu_s"] - figures["opened_cpu_s"]
                figures |= {"rows_per_s": done["rows_per_s"]}
                runs[arm].append({"rows_per_processor_s": options.rows / seconds, **figures})
                print(arm, runs[arm][-1], flush=True)
    return {
        "rows": options.rows,
        **{
            arm: {
                key: ratio_of_pairs([r[key] for r in runs[arm]], [r[key] for r in runs["before"]])
                for key in ("rows_per_processor_s", "rows_per_s", "private_gb")
            }
            | {
                "equal_answers": sum(map(str.__eq__, answers[arm], answers["before"]))
                / len(answers["before"])
            }
            for arm in ("now", "now_in_bfloat16")
        },
        "runs": runs,
    }


def main() -> None:
    """Measure and write benchmarks/results/prediction.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--before", help="source tree of another fedfora")
    parser.add_argument("--model_name_or_path", default="clinic-base")
    parser.add_argument("--train_file", default="clinic")
    parser.add_argument("--test_file", default="clinic:test")
    parser.add_argument("--adapter", help="one trained before, in place of --steps")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning_rate", default="1e-2")
    arguments = parser.parse_args()
    if arguments.before:
        name = Path(arguments.model_name_or_path).name
        write(f"prediction-versions-{name}", versions(arguments))
        return
    silence_libraries()
    sizes, figures = [8, 16, 32], {}
    with tempfile.TemporaryDirectory() as place:
        adapter = trained_adapter(Path(place) / "adapter")

        def base(quantization: str) -> Base:
            return load_base(
                ModelArguments(model_name_or_path="clinic-base", quantization=quantization)
            )

        models = {
            "demo": (load_adapter(base("none"), adapter), base("none").tokenizer),
            "merged": (merge_adapter(base("none"), adapter)[0], base("none").tokenizer),
            "demo_nf4": (load_adapter(base("nf4"), adapter), base("nf4").tokenizer),
        }
        wide = wide_base(Path(place) / "wide")
        models["wide"] = (add_adapter(wide, AdapterArguments(), seed=0), wide.tokenizer)
        for name, (model, tokenizer) in models.items():
            figures[name] = measure(model, tokenizer, arguments.rows, sizes, arguments.pairs)
    write("prediction", figures)


if __name__ == "__main__":
    main()
