"""Privacy against use: F1 on the clinics' task under record-level differential privacy.

One site holds all 2,400 notes, and a step's sample has 120 of them on average. Every row of the
result is one training: all five factors, or the core alone between bases from the base weights'
SVD; without privacy, without noise but clipped, and under a budget. Each line is written as soon as
it is known.

    python benchmarks/privacy.py --epsilons inf 8 3 1 --modes all core --seeds 1
"""

import argparse
import json
import time
from typing import Any

import torch
from peft import get_peft_model

from fedfora._seeds import derive_seed
from fedfora.adapter import ForaConfig
from fedfora.data.encoding import encode_examples, prompt_format
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.evaluate import evaluate
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments
from fedfora.privacy.settings import PrivacyArguments
from fedfora.training.local import train_locally
from fedfora.training.privacy_plan import plan_record_privacy
from fedfora.training.schedule import Stretch
from fedfora.training.settings import TrainArguments
from record import RESULTS, write

INFINITE = float("inf")


def main() -> None:
    """Run all trainings that are asked for and write benchmarks/results/privacy.json."""
    arguments = parse()
    torch.set_num_threads(1)
    rows = []
    for seed in range(arguments.seeds):
        for mode in arguments.modes:
            for epsilon in arguments.epsilons:
                rows.append(one(arguments, mode, epsilon, seed))
                print(json.dumps(rows[-1]), flush=True)
                if arguments.write:
                    write("privacy", {"setting": setting(arguments), "rows": rows})


def parse() -> argparse.Namespace:
    """Return what was typed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[INFINITE, 8, 3, 1])
    parser.add_argument("--modes", nargs="+", default=["all", "core"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows_per_step", type=int, default=120)
    parser.add_argument("--test_rows", type=int, default=120)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--clipping_norm", type=float, default=1.0)
    parser.add_argument("--rates", type=json.loads, default={"all": 0.01, "core": 0.03})
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS}/privacy.json")
    return parser.parse_args()


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all rows have in common."""
    common = {name: value for name, value in vars(arguments).items() if name != "write"}
    return {**common, "delta": 1e-5, "train_rows": 2400, "base": "clinic-base, float32"}


def one(arguments: argparse.Namespace, mode: str, epsilon: float, seed: int) -> dict[str, Any]:
    """Train once and score; an infinite epsilon is ordinary training."""
    base = load_base(ModelArguments(model_name_or_path="clinic-base", quantization="none"))
    torch.manual_seed(derive_seed(seed, "adapter"))
    core = {"trainable": "core", "init_weights": "svd"} if mode == "core" else {}
    config = ForaConfig(task_type="CAUSAL_LM", r=arguments.rank, **core)
    model = get_peft_model(base.model, config)
    data = DataArguments(max_target_length=64)
    prompts = prompt_format(data, base.tokenizer)
    encoded = encode_examples(load_examples("clinic", data), base.tokenizer, prompts)
    train = TrainArguments(
        learning_rate=arguments.rates[mode],
        per_device_train_batch_size=arguments.rows_per_step // 4,
        gradient_accumulation_steps=4,
    )
    privacy = None
    if epsilon != INFINITE:
        privacy = plan_record_privacy(
            PrivacyArguments(
                privacy_unit="record",
                target_epsilon=epsilon,
                clipping_norm=arguments.clipping_norm,
            ),
            train,
            num_rows=len(encoded),
            total_steps=arguments.steps,
        )
    started = time.process_time()
    result = train_locally(
        model,
        base.tokenizer,
        encoded,
        train,
        stretch=Stretch(0, arguments.steps, arguments.steps),
        seed=derive_seed(seed, "train"),
        privacy=privacy,
    )
    seconds = time.process_time() - started
    test = load_examples("clinic:test", data)[: arguments.test_rows]
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


if __name__ == "__main__":
    main()
