"""How well FoRA learns beside LoRA: held-out loss after equal steps, on the clinics' notes.

At each rank R four adapters on all linear layers: LoRA and FoRA of rank R; FoRA with the narrowest
inner width, which has about LoRA's number of parameters; and LoRA whose ranks are raised layer by
layer to FoRA's number of parameters. Each learning rate and seed is one run.

    OMP_NUM_THREADS=1 python benchmarks/fora_learning.py
    OMP_NUM_THREADS=1 python benchmarks/fora_learning.py --model_name_or_path SMOLLM2 \
        --train_file ade_train.json --test_file ade_test.json --ranks 8 --learning_rates 1e-3 \
        --forms lora fora "lora, wide" --steps 64 --results fora_learning-ade
"""

import argparse
import itertools
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from fedfora import ForaConfig
from fedfora.adapter import ForaLinear
from fedfora.cli.console import silence_libraries
from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments
from fedfora.training.local import StepWindow, train_locally
from fedfora.training.settings import TrainArguments
from record import write

FORMS = ("lora", "fora", "fora, narrow", "lora, wide")
BATCH = 8


def adapted(model: str, form: str, rank: int, seed: int) -> tuple[Any, Any]:
    """Return the base with a fresh adapter, and its tokenizer."""
    base = load_base(ModelArguments(model_name_or_path=model, quantization="none", device="cpu"))
    torch.manual_seed(seed)
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    if form == "fora":
        config: Any = ForaConfig(r=rank, **common)
    elif form == "fora, narrow":
        config = ForaConfig(r=rank, inner_dim=2, **common)
    elif form == "lora":
        config = LoraConfig(r=rank, lora_alpha=2 * rank, **common)
    else:
        ranks = wide_ranks(model, rank)
        alphas = {name: 2 * r for name, r in ranks.items()}
        config = LoraConfig(r=rank, rank_pattern=ranks, alpha_pattern=alphas, **common)
    return get_peft_model(base.model, config), base.tokenizer


def wide_ranks(name: str, rank: int) -> dict[str, int]:
    """Return for each layer the LoRA rank with FoRA's number of parameters, rounded."""
    model, _ = adapted(name, "fora", rank, 0)
    ranks = {}
    for module, layer in model.named_modules():
        if isinstance(layer, ForaLinear):
            numbers = sum(p.numel() for n, p in layer.named_parameters() if "fora_" in n)
            width = layer.in_features + layer.out_features
            ranks[module.removeprefix("base_model.model.")] = max(1, round(numbers / width))
    return ranks


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, encoded: list[dict[str, list[int]]]) -> float:
    """Return the mean loss of an answer token."""
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    total, count = 0.0, 0
    for start in range(0, len(encoded), 2 * BATCH):
        batch = collate(encoded[start : start + 2 * BATCH])
        labels: Tensor = batch["labels"]
        tokens = int((labels[:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


def run(
    options: argparse.Namespace, form: str, rank: int, learning_rate: float, seed: int
) -> dict[str, Any]:
    """Train one adapter and return its held-out loss and size."""
    model, tokenizer = adapted(options.model_name_or_path, form, rank, seed)
    data = DataArguments(max_target_length=64)
    prompts = prompt_format_of(data, tokenizer)
    rows, test = (
        encode_examples(load_examples(name, data), tokenizer, prompts)
        for name in (options.train_file, options.test_file)
    )
    settings = TrainArguments(
        learning_rate=learning_rate,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
    )
    stretch = StepWindow(first_step=0, num_steps=options.steps, total_steps=options.steps)
    train_locally(model, rows, settings, stretch=stretch, seed=seed)
    return {
        "form": form,
        "rank": rank,
        "learning_rate": learning_rate,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "held_out_loss": held_out_loss(model, tokenizer, test),
    }


def table(runs: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a line for each rank and form: loss over the seeds at each rate, and the best."""
    lines = []
    for rank, form in itertools.product(options.ranks, options.forms):
        mine = [r for r in runs if (r["rank"], r["form"]) == (rank, form)]
        losses = {
            str(rate): [r["held_out_loss"] for r in mine if r["learning_rate"] == rate]
            for rate in options.learning_rates
        }
        line = {"rank": rank, "form": form, "parameters": mine[0]["parameters"], "losses": losses}
        lines.append(line | {"best_mean": min(mean(values) for values in losses.values())})
    return lines


def main() -> None:
    """Run all and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--model_name_or_path", default="clinic-base")
    parser.add_argument("--train_file", default="clinic")
    parser.add_argument("--test_file", default="clinic:test")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--results", default="fora_learning", help="name of the file written")
    options = parser.parse_args()
    silence_libraries()
    runs = []
    for rank, form, rate, seed in itertools.product(
        options.ranks, options.forms, options.learning_rates, range(options.seeds)
    ):
        runs.append(run(options, form, rank, rate, seed))
        print(runs[-1], flush=True)
    figures = {
        "steps": options.steps,
        "batch": BATCH,
        "seeds": options.seeds,
        "table": table(runs, options),
    }
    write(options.results, figures)


if __name__ == "__main__":
    main()
