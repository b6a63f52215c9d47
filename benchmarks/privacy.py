"""Privacy against use: F1 on the clinics' task under record-level differential privacy.

One site holds all 2,400 notes, and a step's sample has 240 of them on average. Every row of the
result is one training: all five factors, or the core alone between bases from the base weights'
SVD; without privacy (neither noise nor clipping), or under a budget. Each line is written as soon
as it is known. Last comes what a private row costs beside a plain one, in pairs of short trainings.

    python benchmarks/privacy.py --epsilons inf 8 3 1 --modes all core --seeds 3 --write
"""

import argparse
import json
import time
from typing import Any

import torch
from peft import get_peft_model

from fedfora.adapter import ForaConfig
from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.evaluate import evaluate
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments
from fedfora.privacy.settings import PrivacyArguments
from fedfora.seeds import derive_seed
from fedfora.training.dp_sgd import RecordPrivacy
from fedfora.training.local import train_locally
from fedfora.training.privacy_plan import plan_private_training
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments
from record import RESULTS, ratio_of_pairs, write

INFINITE = float("inf")
DATA = DataArguments(max_target_length=64)
PIECES = 8  # of a step's sample, one forward pass each
TIMED_ROWS, TIMED_STEPS = 120, 3


def main() -> None:
    """Run all trainings that are asked for and write benchmarks/results/privacy.json."""
    arguments = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    found = {"setting": setting(arguments), "rows": rows}
    for seed in range(arguments.seeds):
        for mode in arguments.modes:
            for epsilon in arguments.epsilons:
                rows.append(one(arguments, mode, epsilon, seed))
                print(json.dumps(rows[-1]), flush=True)
                if arguments.write:
                    write(arguments.results, found)
    if arguments.pairs:
        found["seconds_of_a_private_row_over_a_plain_one"] = cost_of_a_row(arguments)
        print(json.dumps(found["seconds_of_a_private_row_over_a_plain_one"]))
        if arguments.write:
            write(arguments.results, found)


def parse() -> argparse.Namespace:
    """Return what was typed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[INFINITE, 8, 3, 1])
    parser.add_argument("--modes", nargs="+", default=["all", "core"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows_per_step", type=int, default=240)
    parser.add_argument("--test_rows", type=int, default=60)
    parser.add_argument("--ranks", type=json.loads, default={"all": 8, "core": 8})
    parser.add_argument("--clipping_norm", type=float, default=1.0)
    parser.add_argument("--rates", type=json.loads, default={"all": 0.01, "core": 0.03})
    parser.add_argument("--pairs", type=int, default=3, help="of short trainings; 0 for none")
    parser.add_argument("--results", default="privacy", help=f"name of the file in {RESULTS}")
    parser.add_argument("--write", action="store_true", help="write that file")
    return parser.parse_args()


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all rows have in common."""
    common = {
        name: value for name, value in vars(arguments).items() if name not in ("write", "results")
    }
    return {**common, "delta": 1e-5, "train_rows": 2400, "base": "clinic-base, float32"}


def one(arguments: argparse.Namespace, mode: str, epsilon: float, seed: int) -> dict[str, Any]:
    """Train once and score; an infinite epsilon is ordinary training."""
    base, model, prompts, encoded = start(arguments, mode, seed)
    train = TrainArguments(
        learning_rate=arguments.rates[mode],
        lr_scheduler_type="linear",
        per_device_train_batch_size=arguments.rows_per_step // PIECES,
        gradient_accumulation_steps=PIECES,
    )
    privacy = None
    if epsilon != INFINITE:
        private = plan_private_training(
            PrivacyArguments(
                privacy_unit="record",
                target_epsilon=epsilon,
                clipping_norm=arguments.clipping_norm,
            ),
            train,
            output_dir="benchmark",
            ledger="never-written",  # the rows are made up: nothing is entered
            num_rows=len(encoded),
            first_step=0,
            total_steps=arguments.steps,
        )
        assert private is not None
        privacy = private.privacy
    started = time.process_time()
    result = train_locally(
        model,
        base.tokenizer,
        encoded,
        train,
        stretch=StepWindow(0, arguments.steps, arguments.steps),
        seed=derive_seed(seed, "train"),
        privacy=privacy,
    )
    seconds = time.process_time() - started
    test = load_examples("clinic:test", DATA)[: arguments.test_rows]
    scores = evaluate(model, base.tokenizer, test, prompts, batch_size=60, max_new_tokens=64).scores
    return {
        "mode": mode,
        "epsilon": None if epsilon == INFINITE else epsilon,
        "seed": seed,
        "noise_multiplier": None if privacy is None else round(privacy.noise_multiplier, 4),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "f1": round(scores["f1"], 4),
        "parse_rate": round(scores["parse_rate"], 4),
        "loss": round(result.loss, 4),
        "cpu_seconds": round(seconds, 1),
    }


def start(arguments: argparse.Namespace, mode: str, seed: int) -> Any:
    """Return base, model with a fresh adapter, prompt format and encoded rows."""
    base = load_base(ModelArguments(model_name_or_path="clinic-base", quantization="none"))
    torch.manual_seed(derive_seed(seed, "adapter"))
    core = {"trainable": "core", "init_weights": "svd"} if mode == "core" else {}
    config = ForaConfig(task_type="CAUSAL_LM", r=arguments.ranks[mode], **core)
    prompts = prompt_format_of(DATA, base.tokenizer)
    encoded = encode_examples(load_examples("clinic", DATA), base.tokenizer, prompts)
    return base, get_peft_model(base.model, config), prompts, encoded


def cost_of_a_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return processor time of a private row over that of a plain one, both in pieces of 30."""
    base, model, _, encoded = start(arguments, "all", 0)
    encoded.sort(key=lambda row: len(row["input_ids"]))
    rows = encoded[len(encoded) // 2 :][:TIMED_ROWS]  # of like length, so neither pads more
    train = TrainArguments(per_device_train_batch_size=30, gradient_accumulation_steps=4)
    hidden = RecordPrivacy(1.0, 1.0, TIMED_ROWS, TIMED_ROWS)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(arguments.pairs):
        for private in (False, True) if pair % 2 else (True, False):
            started = time.process_time()
            train_locally(
                model,
                base.tokenizer,
                rows,
                train,
                stretch=StepWindow(0, TIMED_STEPS, TIMED_STEPS),
                seed=pair,
                privacy=hidden if private else None,
            )
            seconds[private].append((time.process_time() - started) / TIMED_STEPS / TIMED_ROWS)
    return ratio_of_pairs(seconds[True], seconds[False]) | {
        "private_seconds": seconds[True],
        "plain_seconds": seconds[False],
    }


if __name__ == "__main__":
    main()
