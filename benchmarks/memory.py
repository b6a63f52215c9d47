"""The memory that a training and a federation really take, beside the estimate.

`shape`: a Llama of Baichuan2's sizes with random weights in bfloat16, written shard by shard, and
one step on one row of 512 + 512 tokens: FoRA rank 2 on all linear layers, nf4, checkpointing.
`settings`: a model of yours on rows of yours, in several formats and batch sizes, by `train` and
`simulate` (five sites).

What counts is private memory (RssAnon of the command, sampled) and what of the weights is used from
the mapped checkpoint. Resident memory also counts pages of the checkpoint that the system can take
back. `loading` is the peak before the first step.

    OMP_NUM_THREADS=1 python benchmarks/memory.py shape 7b --scratch DIR
    OMP_NUM_THREADS=1 python benchmarks/memory.py settings --model_name_or_path DIR \
        --train_file ade_train.json
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write

SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "vocab_size": 125_696}  # fmt: skip
SHAPES = {
    "7b": SEVEN,
    "13b": SEVEN | {"hidden_size": 5120, "intermediate_size": 13_696, "num_hidden_layers": 40,
                    "num_attention_heads": 40},
    "small": SEVEN | {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4,
                      "num_attention_heads": 8},
}  # fmt: skip
BARS_GB = {"7b": 8, "13b": 13}
GB = 1e9
FORMATS = {
    "bfloat16": "--quantization none --torch_dtype bfloat16",
    "nf4": "--quantization nf4 --torch_dtype bfloat16",
    "float32": "--quantization none --torch_dtype float32",
}


def write_checkpoint(directory: Path, shape: str) -> None:
    """Write a model with random weights, a shard for each layer, and the bundled tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedfora.models.resolve import model_path

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model_path("clinic-base")).save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, weight in model.named_parameters():
        shard = ".".join(name.split(".")[:3])
        shards.setdefault(f"{shard}.safetensors", {})[name] = tuple(weight.shape)
    for file, weights in shards.items():
        drawn = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) < 2
            else torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02)
            for name, size in weights.items()
        }
        save_file(drawn, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, weights in shards.items() for name in weights}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def estimated(words: list[str]) -> dict[str, int]:
    """Return the bytes that `check data` foretells for a training."""
    from fedfora.cli.check import SECTIONS
    from fedfora.config import ConfigParser
    from fedfora.data.encoding import encode_examples, prompt_format_of
    from fedfora.data.loading import load_examples
    from fedfora.models.loading import load_tokenizer
    from fedfora.training.packing import estimate_step

    data, model, adapter, train = ConfigParser(SECTIONS).parse(words)
    tokenizer = load_tokenizer(model)
    examples = load_examples(data.train_file, data)
    encoded = encode_examples(examples, tokenizer, prompt_format_of(data, tokenizer))
    estimate, _ = estimate_step(model, adapter, train, encoded)
    parts = {name: getattr(estimate, name) for name in ("base", "adapter", "activations", "total")}
    return {name: int(size) for name, size in parts.items()}


def apart(function: Any, *values: Any) -> Any:
    """Call a function in a process of its own, so that this one stays small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, values)


def measured(
    command: list[str], directory: Path, source: str | None = None, limit_gb: float = 1e9
) -> dict[str, Any]:
    """Run a program that writes `out/metrics.jsonl`; return its peaks, times and steps.

    Args:
        command: The program, to be run by this interpreter.
        directory: Where its output goes.
        source: Source tree of another fedfora.
        limit_gb: Private memory at which the program is ended, without a result.
    """
    log, metrics = directory / "log", directory / "out" / "metrics.jsonl"
    environment = os.environ | ({"PYTHONPATH": source} if source else {})
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, env=environment
        )
    peaks = {"loading": 0, "private": 0, "resident": 0}
    lines: list[dict[str, Any]] = []
    ended, status, usage, opened, started = 0, 0, None, None, time.monotonic()
    while not ended:
        time.sleep(0.05)
        now = _memory(process.pid)
        text = metrics.read_text() if metrics.exists() else ""
        if metrics.exists() and opened is None:
            opened = _processor_s(process.pid)
        for line in text.splitlines()[len(lines) :] if text.endswith("\n") else []:
            times = {"cpu_s": _processor_s(process.pid), "wall_s": time.monotonic() - started}
            lines.append(json.loads(line) | times)
        phase = "loading" if opened is None else "private"
        peaks[phase] = max(peaks[phase], now.get("RssAnon", 0))
        peaks["resident"] = max(peaks["resident"], now.get("VmHWM", 0))
        if peaks[phase] > limit_gb * GB:
            process.kill()
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        sys.exit(f"{' '.join(command)}: {log.read_text()[-2000:]}")
    return {
        **{f"{name}_gb": round(size / GB, 3) for name, size in peaks.items()},
        "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
        "wall_s": round(time.monotonic() - started, 1),
        "opened_cpu_s": opened,
        "lines": lines,
    }


def speed(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens per second, of the processor and of the clock, between start and last step."""
    first = next(line for line in lines if line["event"] == "started")
    steps = [line for line in lines if line["event"] == "step"]
    tokens = steps[-1]["tokens"]
    return {
        "tokens": tokens,
        "tokens_per_processor_s": round(tokens / (steps[-1]["cpu_s"] - first["cpu_s"]), 2),
        "tokens_per_s": round(tokens / (steps[-1]["wall_s"] - first["wall_s"]), 2),
        "losses": [round(step["loss"], 4) for step in steps],
    }


def _processor_s(pid: int) -> float:
    """Return the processor time of a process and all its threads until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def available_gb() -> float:
    """Return the memory that programs can still get."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["MemAvailable"] * 1024 / GB


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith("kB"))
    return {key[:-1]: int(size) * 1024 for key, size, _ in pairs}


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """Train one step of a large model with random weights; return its memory and speed."""
    sizes = SHAPES[options.shape]
    hidden, inner, vocabulary = (
        sizes[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    layers = sizes["num_hidden_layers"] * hidden * (4 * hidden + 3 * inner)
    embeddings = 2 * vocabulary * hidden
    needed = 2 * (layers + embeddings)
    if shutil.disk_usage(options.scratch).free < 1.2 * needed:
        sys.exit(f"--scratch {options.scratch}: less than {1.2 * needed / GB:.0f} GB are free")
    text = "a cough for three days, worse at night, no fever, " * 200
    flags = (
        f"--max_source_length 512 --max_target_length 512 --quantization {options.quantization} "
        "--lora_rank 2 --max_steps 1 --per_device_train_batch_size 1 "
        "--gradient_accumulation_steps 1"
    )
    flags += "" if options.no_checkpointing else " --gradient_checkpointing"
    with tempfile.TemporaryDirectory(dir=options.scratch) as place:
        directory = Path(place)
        apart(write_checkpoint, directory / "model", options.shape)
        row = {"instruction": "", "input": text, "output": text}
        (directory / "rows.json").write_text(json.dumps([row]))
        words = f"--model_name_or_path {place}/model --train_file {place}/rows.json {flags}".split()
        estimate = apart(estimated, words)
        command = ["-m", "fedfora", "train", *words, "--output_dir", f"{place}/out"]
        figures = measured(command, directory)
    # Embeddings and output layer stay in the mapped file, whose pages are not private.
    mapped = 2 * embeddings if options.quantization != "none" else needed
    return {
        "shape": options.shape,
        "parameters": layers + embeddings,
        "options": flags,
        "bar_gb": BARS_GB.get(options.shape),
        **speed(figures.pop("lines")),
        **figures,
        "mapped_weights_gb": round(mapped / GB, 3),
        "private_and_mapped_weights_gb": round(figures["private_gb"] + mapped / GB, 3),
        "estimate_gb": {name: round(size / GB, 3) for name, size in estimate.items()},
    }


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Measure `train` and `simulate` of one model in several formats and batch sizes."""
    cells = []
    base = f"--model_name_or_path {options.model_name_or_path}"
    for form, flags in FORMATS.items():
        for batch in options.batches:
            train = (
                f"{base} {flags} --train_file {{rows}} --per_device_train_batch_size {batch} "
                "--gradient_accumulation_steps 1"
            )
            epoch = "--num_train_epochs 1 --logging_steps 1"
            cells.append(_cell("train", form, batch, train, epoch, options))
            if batch == options.batches[-1]:
                rounds = "--num_clients 5 --num_rounds 1 --local_steps 1"
                cells.append(_cell("simulate", form, batch, train, rounds, options))
    return {"rows": options.rows, "cells": cells}


def _cell(
    command: str, form: str, batch: int, train: str, more: str, options: argparse.Namespace
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.json"
        lines = Path(options.train_file).read_text().splitlines()[: options.rows]
        rows.write_text("\n".join(lines))
        words = train.format(rows=rows).split()
        estimate = apart(estimated, words)
        run = ["-m", "fedfora", command, *words, *more.split(), "--output_dir", f"{place}/out"]
        figures = measured(run, Path(place))
    steps = figures.pop("lines")
    figures["tokens_per_processor_s"] = (
        speed(steps)["tokens_per_processor_s"] if command == "train" else None
    )
    cell = {"command": command, "format": form, "batch": batch, **figures}
    cell["estimate_gb"] = {name: round(size / GB, 3) for name, size in estimate.items()}
    print(json.dumps(cell), flush=True)
    return cell


def main() -> None:
    """Measure one shape, or the settings of one model, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("shape")
    one.add_argument("shape", choices=SHAPES)
    one.add_argument("--scratch", default=tempfile.gettempdir(), help="where the weights lie")
    one.add_argument("--quantization", default="nf4", choices=["nf4", "int8", "none"])
    one.add_argument("--no_checkpointing", action="store_true")
    some = kinds.add_parser("settings")
    some.add_argument("--model_name_or_path", required=True)
    some.add_argument("--train_file", required=True, help="JSON lines")
    some.add_argument("--rows", type=int, default=40, help="every run sees all of them")
    some.add_argument("--batches", type=int, nargs="+", default=[4, 8])
    options = parser.parse_args()
    if options.kind == "settings":
        write("memory-settings", settings(options))
        return
    figures = shape(options)
    form = "" if options.quantization == "nf4" else f"-{options.quantization}"
    plain = "-plain" if options.no_checkpointing else ""
    write(f"memory-{options.shape}{form}{plain}", figures)


if __name__ == "__main__":
    main()
