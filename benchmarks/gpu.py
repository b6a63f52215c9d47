"""What one GPU says: results equal to the CPU's, memory and speed of large bases, and the board.

    python benchmarks/gpu.py [--model_name_or_path DIR --data_dir DIR]

Nothing is fetched: large bases have random weights that are made on the card. The parts run in the
order of their worth, each in a process of its own with its own time limit, so a part that breaks
costs only itself; every result is written as it comes (benchmarks/results/gpu.json). `--tiny` tries
the same code on the CPU with small shapes.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from fedfora.cli.console import silence_libraries
from fedfora.data.encoding import Encoded, encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.models.adapter_base import add_adapter
from fedfora.models.baichuan.configuration import BaichuanConfig
from fedfora.models.baichuan.modeling import BaichuanForCausalLM
from fedfora.models.loading import Base, load_base
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.reporting.record import peak_memory_bytes, reset_peak_memory
from fedfora.training.local import train_locally
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments
from record import ratio_of_pairs, write

RANK, LENGTH = 8, 1024
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "vocab_size": 125_696}  # fmt: skip
THIRTEEN = SEVEN | {"hidden_size": 5120, "intermediate_size": 13_696, "num_hidden_layers": 40,
                    "num_attention_heads": 40}  # fmt: skip
EIGHT = SEVEN | {"intermediate_size": 14_336, "vocab_size": 128_256, "num_key_value_heads": 8}
SHAPES = {"baichuan2-7b": SEVEN, "baichuan2-13b": THIRTEEN, "llama3-8b": EIGHT}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 512}  # fmt: skip
GIB = 2**30
# Peak memory that the mission promises, in GiB.
BARS = {("baichuan2-7b", "nf4"): 8, ("baichuan2-13b", "nf4"): 13, ("baichuan2-13b", "bf16"): 32}


def parts(options: argparse.Namespace) -> dict[str, int]:
    """Return the names of all parts in the order of their worth, with their limits in seconds."""
    order = [("baichuan2-7b", "nf4"), ("baichuan2-13b", "nf4"), ("baichuan2-7b", "bf16"),
             ("baichuan2-13b", "bf16"), ("llama3-8b", "nf4"), ("llama3-8b", "bf16"),
             ("baichuan2-7b", "int8")]  # fmt: skip
    chosen = {"equal": 90} | {f"{shape}:{form}": 60 for shape, form in order}
    if options.model_name_or_path and options.data_dir:
        chosen |= {f"board:{arm}": 120 for arm in ("base", "fedavg", "central", "alone", "core")}
    return chosen


def device(options: argparse.Namespace) -> str:
    """Return where the parts run."""
    return "cpu" if options.tiny else "cuda"


def equal(options: argparse.Namespace) -> dict[str, Any]:
    """Train the bundled base on the card and on the CPU; return how far apart the losses are."""
    model = ModelArguments(model_name_or_path="clinic-base", quantization="none")
    train = TrainArguments(
        learning_rate=1e-2, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    examples = load_examples("clinic:train", DataArguments())[:32]

    def losses(where: str, settings: ModelArguments, train: TrainArguments) -> list[float]:
        base = load_base(replace(settings, device=where))
        adapted = add_adapter(base, AdapterArguments(lora_rank=RANK, lora_dropout=0.0), seed=1)
        encoded = encode_examples(
            examples, base.tokenizer, prompt_format_of(DataArguments(), base.tokenizer)
        )
        found: list[float] = []
        window = StepWindow(first_step=0, num_steps=4, total_steps=4)
        train_locally(
            adapted,
            encoded,
            train,
            stretch=window,
            seed=1,
            on_step=lambda report: found.append(report.loss),
        )
        return found

    full = replace(model, torch_dtype="float32")
    packed = replace(train, packing=True)
    expected = {False: losses("cpu", full, train), True: losses("cpu", full, packed)}
    cases = {
        "float32": (full, train, 1e-3),
        "packing": (full, packed, 1e-3),
        "checkpointing": (full, replace(train, gradient_checkpointing=True), 1e-3),
        "bfloat16": (replace(model, torch_dtype="bfloat16"), train, 5e-2),
        "nf4": (replace(model, quantization="nf4"), train, 0.3),
        "int8": (replace(model, quantization="int8"), train, 0.3),
    }
    results: dict[str, Any] = {}
    for name, (settings, chosen, tolerance) in cases.items():
        try:
            found = losses(device(options), settings, chosen)
            apart = max(abs(a - b) for a, b in zip(found, expected[chosen.packing], strict=True))
            results[name] = {"ok": apart <= tolerance, "apart": apart, "tolerance": tolerance}
        except Exception as error:
            results[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    return {"ok": all(case["ok"] for case in results.values()), "cases": results}


def random_base(shape: str, form: str, options: argparse.Namespace) -> nn.Module:
    """Return a model of that shape with random weights, each layer held in its form at once."""
    sizes = TINY if options.tiny else SHAPES[shape]
    if shape.startswith("baichuan"):
        rope = {"max_position_embeddings": 4096} if "7b" in shape else {}
        config: Any = BaichuanConfig(**sizes, model_max_length=4096, **rope)
        make: Any = BaichuanForCausalLM
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config, make = LlamaConfig(**sizes, max_position_embeddings=8192), LlamaForCausalLM
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = make(config).to(torch.bfloat16)
    where = device(options)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and form != "bf16" and not name.endswith("lm_head"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _quantized(module, form, where))
        elif not any(True for _ in module.children()):
            _filled(module, where)
    return model.requires_grad_(False).eval()


def _filled(module: nn.Module, where: str) -> None:
    for key, value in list(module.named_parameters(recurse=False)):
        drawn = torch.empty(value.shape, dtype=value.dtype, device=where)
        drawn.fill_(1.0) if value.ndim < 2 else drawn.normal_(std=0.02)
        setattr(module, key, nn.Parameter(drawn, requires_grad=False))
    if any(value.is_meta for value in module.buffers()):  # rotary frequencies follow the config
        fresh = type(module)(module.config).to(where)
        for key, value in fresh.named_buffers():
            module.register_buffer(key, value, persistent=False)


def _quantized(module: nn.Linear, form: str, where: str) -> nn.Module:
    import bitsandbytes as bnb

    weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=where).normal_(std=0.02)
    sizes: Any = (module.in_features, module.out_features)
    with torch.device("meta"):
        made: Any = (
            bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            if form == "nf4"
            else bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        )
    made.weight = (
        bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(where)
        if form == "nf4"
        else bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to(where)
    )
    return made


def shape_and_form(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train FoRA and plain LoRA on a large base, in turns; return memory and tokens per second."""
    from peft import LoraConfig, get_peft_model

    shape, form = part.split(":")
    model = random_base(shape, form, options)
    tokenizer = load_base(ModelArguments(model_name_or_path="clinic-base")).tokenizer
    length = 64 if options.tiny else LENGTH
    rows: Encoded = [
        {"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}
        for ids in torch.randint(5, 500, (8, length)).tolist()
    ]
    figures: dict[str, Any] = {"base_gib": _allocated(model)}
    for checkpointing in (True, False):
        try:
            figures["checkpointing" if checkpointing else "plain"] = _arms(
                model, tokenizer, rows, checkpointing, options, LoraConfig, get_peft_model
            )
        except torch.OutOfMemoryError:
            figures["plain"] = "out of memory"
    if bar := BARS.get((shape, form)):
        figures["bar_gib"] = bar
        figures["ok"] = options.tiny or figures["checkpointing"]["fora"]["peak_gib"] <= bar
    return figures


def _arms(
    model: Any,
    tokenizer: Any,
    rows: Encoded,
    checkpointing: bool,
    options: argparse.Namespace,
    lora_config: Any,
    get_peft_model: Any,
) -> dict[str, Any]:
    train = TrainArguments(
        learning_rate=1e-4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=checkpointing,
    )
    times: dict[str, list[float]] = {"fora": [], "lora": []}
    peaks: dict[str, float] = {}
    for _ in range(1 if options.tiny else 3):
        for arm, seen in times.items():
            if arm == "fora":
                base = Base(model, tokenizer, "benchmark", "none")
                adapted = add_adapter(base, AdapterArguments(lora_rank=RANK), seed=0)
            else:
                adapted = get_peft_model(
                    model, lora_config(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
                )
            gc.collect()
            reset_peak_memory()
            ends: list[float] = []
            steps = 2 if options.tiny else 5
            train_locally(
                adapted,
                rows,
                train,
                stretch=StepWindow(first_step=0, num_steps=steps, total_steps=steps),
                seed=1,
                on_step=lambda report, ends=ends: ends.append(_now()),
            )
            seen.append(median(b - a for a, b in pairwise(ends)))
            peaks[arm] = peak_memory_bytes() / GIB
            model = adapted.unload()
            model.requires_grad_(False)
    tokens = len(rows[0]["input_ids"])
    arms: dict[str, Any] = {
        arm: {"peak_gib": round(peaks[arm], 2), "tokens_per_second": round(tokens / median(seen))}
        for arm, seen in times.items()
    }
    return arms | {"fora_to_lora_step": ratio_of_pairs(times["fora"], times["lora"])}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _allocated(model: nn.Module) -> float:
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return round(parameters / GIB, 2)


def board(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a cell of the board on the card."""
    directory = Path(__file__).parent
    subprocess.run(
        [sys.executable, str(directory / "board.py"), "--data", "ade", "--arms", part[6:],
         "--data_dir", options.data_dir, "--model_name_or_path", options.model_name_or_path,
         "--rates", "1e-3", "--rounds", "8", "--local_steps", "16", "--batch", "8"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = (directory / "results" / "board" / "ade.jsonl").read_text().splitlines()
    cell = json.loads(lines[-1])
    cells = cell.get("sites", {"": cell})
    return {name: {k: c[k] for k in ("mean", "worst", "unseen")} for name, c in cells.items()}


def one_part(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in this process."""
    if part == "equal":
        return equal(options)
    return board(part, options) if part.startswith("board:") else shape_and_form(part, options)


def main() -> None:
    """Run every part in a process of its own, and write each result as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model_name_or_path", help="SmolLM2, for the board's cells")
    parser.add_argument("--data_dir", help="rows as examples/medical writes them")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--limit_s", type=int, default=480, help="of all parts together")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("There is no GPU here (torch.cuda.is_available() is false); --tiny tries the CPU.")
    silence_libraries()
    if options.part:
        print(json.dumps(one_part(options.part, options)))
        return
    limits = parts(options)
    if unknown := set(options.parts or []) - limits.keys():
        sys.exit(f"--parts {' '.join(sorted(unknown))}: there are {' '.join(limits)}")
    chosen = {name: limits[name] for name in options.parts or limits}
    print(f"{len(chosen)} parts, at most {options.limit_s / 60:.0f} minutes", flush=True)
    deadline = time.monotonic() + options.limit_s
    card = None if options.tiny else torch.cuda.get_device_name()
    figures: dict[str, Any] = {"card": card, "cuda": torch.version.cuda, "parts": {}}
    for name, limit in chosen.items():
        started = time.monotonic()
        allowed = min(deadline - started, limit * (20 if options.tiny else 1))
        if allowed < 10:
            figures["parts"][name] = {"error": f"not reached within --limit_s {options.limit_s}"}
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
        try:
            # A broken part says why on its last line.
            run = subprocess.run(command, capture_output=True, text=True, timeout=allowed)
            lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
            result = json.loads(lines[-1]) if run.returncode == 0 else {"error": lines[-1][:500]}
        except subprocess.TimeoutExpired:
            result = {"error": f"more than {allowed:.0f} s"}
        figures["parts"][name] = result | {"seconds": round(time.monotonic() - started, 1)}
        if options.tiny:
            print(json.dumps({name: figures["parts"][name]}), flush=True)
        else:
            write("gpu", figures)


if __name__ == "__main__":
    main()
