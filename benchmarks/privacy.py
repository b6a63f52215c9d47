"""Privacy against use: F1 on the clinics' task under record-level differential privacy.

Each row of the result is one training with the product's own recipe: a budget is named and nothing
else, but for what is typed here. "scratch": one site holds all 2,400 notes of the four clinics.
"public": the notes of three clinics count as public; an adapter is trained on them without privacy,
and from it one on the 600 notes of the fourth, whose test notes are answered. An infinite budget is
the same training with neither noise nor clipping. Each line is written as soon as it is known. Last
comes what a private row costs beside a plain one, in pairs of short trainings.

With `--sites 4` each row is a federation whose sites share the noise under secure aggregation: from
scratch the four clinics, from a public start four sites of 600 new notes of that fourth clinic. An
infinite budget then means no noise, with gradients clipped as ever.

    python benchmarks/privacy.py --epsilons 8 3 --starts scratch public --write
    python benchmarks/privacy.py --epsilons 3 --starts public --sites 4 --pairs 0 --write
"""

import argparse
import json
import os
import random
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model

import fedfora
from fedfora.adapter import ForaConfig
from fedfora.adapter.state import read_state, write_state
from fedfora.data.clinic import SPECIALTIES, clinic_rows, draw_facts, note_row
from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import example_of, load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.evaluate import evaluate
from fedfora.models.loading import load_base
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.privacy.outlook import noise_to_signal
from fedfora.privacy.settings import PrivacyArguments
from fedfora.seeds import derive_seed
from fedfora.training.dp_sgd import RecordPrivacy
from fedfora.training.local import train_locally
from fedfora.training.privacy_plan import plan_private_training, with_learning_rate
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments, private_steps
from record import RESULTS, ratio_of_pairs, write

INFINITE = float("inf")
DATA = DataArguments(max_target_length=64)
PRIVATE_CLINIC = "dermatology"  # of a public start
PUBLIC = TrainArguments(learning_rate=1e-2, per_device_train_batch_size=24, max_steps=150)
TIMED_ROWS, TIMED_STEPS = 120, 3


def main() -> None:
    """Run all trainings that are asked for and write benchmarks/results/privacy.json."""
    arguments = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    found = {"setting": setting(arguments), "rows": rows}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for kind in arguments.starts:
            if arguments.sites > 1:
                for epsilon in arguments.epsilons:
                    rows.append(federation(arguments, kind, epsilon, seed))
                    print(json.dumps(rows[-1]), flush=True)
                    if arguments.write:
                        write(arguments.results, found)
                continue
            site = prepare(kind, seed, arguments.lora_rank, arguments.train_rows)
            begun = answered(site, arguments)
            rows.append({"start": kind, "seed": seed, "steps": 0, "f1": round(begun["f1"], 4)})
            for epsilon in arguments.epsilons:
                rows.append(one(arguments, site, epsilon, seed) | {"start": kind})
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
    parser.add_argument("--epsilons", type=float, nargs="+", default=[INFINITE, 8, 3])
    parser.add_argument("--starts", nargs="+", default=["scratch", "public"])
    parser.add_argument("--sites", type=int, default=1, help="more than one share the noise")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--train_rows", type=int, help="new private notes of one site")
    parser.add_argument("--steps", type=int, default=-1, help="default: the recipe's")
    parser.add_argument("--sampling_rate", type=float, help="default: the recipe's")
    parser.add_argument("--learning_rate", type=float, help="default: the recipe's")
    parser.add_argument("--secagg_threshold", type=float, default=0.66, help="1: none may drop out")
    parser.add_argument("--lora_rank", type=int, default=8)
    parser.add_argument("--test_rows", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=3, help="of short trainings; 0 for none")
    parser.add_argument("--results", default="privacy", help=f"name of the file in {RESULTS}")
    parser.add_argument("--write", action="store_true", help="write that file")
    return parser.parse_args()


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all rows have in common."""
    common = {
        name: value for name, value in vars(arguments).items() if name not in ("write", "results")
    }
    return {**common, "delta": 1e-5, "base": "clinic-base, float32"}


def prepare(kind: str, seed: int, rank: int, count: int | None = None) -> dict[str, Any]:
    """Return base, model, prompts, private rows, test rows and the adapter to start from."""
    base = load_base(ModelArguments(model_name_or_path="clinic-base", quantization="none"))
    torch.manual_seed(derive_seed(seed, "adapter"))
    model = get_peft_model(base.model, ForaConfig(task_type="CAUSAL_LM", r=rank))
    prompts = prompt_format_of(DATA, base.tokenizer)
    rows, test = load_examples("clinic", DATA), load_examples("clinic:test", DATA)
    site = {"base": base, "model": model, "prompts": prompts, "public": kind == "public"}
    if kind == "public":
        others = [row for row in rows if row.columns["specialty"] != PRIVATE_CLINIC]
        rows, test = (
            [row for row in each if row.columns["specialty"] == PRIVATE_CLINIC]
            for each in (rows, test)
        )
        train_locally(
            model,
            encode_examples(others, base.tokenizer, prompts),
            PUBLIC,
            stretch=StepWindow(0, PUBLIC.max_steps, PUBLIC.max_steps),
            seed=derive_seed(seed, "public"),
        )
    if count is not None:
        names = {row.columns["specialty"] for row in rows}
        rows = [
            example_of(note, "new notes", DATA, answers_needed=True)
            for note in new_notes(names, count)
        ]
    encoded = encode_examples(rows, base.tokenizer, prompts)
    return site | {"rows": encoded, "test": test, "adapter": read_state(model)}


def answered(site: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the scores of the adapter that the model has now."""
    test, tokenizer = site["test"][: arguments.test_rows], site["base"].tokenizer
    return evaluate(
        site["model"], tokenizer, test, site["prompts"], batch_size=60, max_new_tokens=64
    ).scores


def one(
    arguments: argparse.Namespace, site: dict[str, Any], epsilon: float, seed: int
) -> dict[str, Any]:
    """Train once and score."""
    model, rows = site["model"], site["rows"]
    write_state(model, site["adapter"])
    hidden = PrivacyArguments(
        privacy_unit="record",
        target_epsilon=None if epsilon == INFINITE else epsilon,
        noise_multiplier=0.0 if epsilon == INFINITE else None,
        clipping_norm=epsilon if epsilon == INFINITE else 1.0,
        sampling_rate=arguments.sampling_rate,
    )
    asked = TrainArguments(learning_rate=arguments.learning_rate, max_steps=arguments.steps)
    adapter = AdapterArguments(start_adapter="public" if site["public"] else None)
    steps = private_steps(asked, hidden, len(rows))
    train = with_learning_rate(asked, hidden, adapter, model, steps)
    private = plan_private_training(
        hidden,
        train,
        output_dir="benchmark",
        ledger="never-written",  # the rows are made up: nothing is entered
        num_rows=len(rows),
        first_step=0,
        total_steps=steps,
    )
    assert private is not None
    started = time.process_time()
    result = train_locally(
        model,
        rows,
        train,
        stretch=StepWindow(0, steps, steps),
        seed=derive_seed(seed, "train"),
        privacy=private.privacy,
    )
    seconds = time.process_time() - started
    scores = answered(site, arguments)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    nu = noise_to_signal(private.release(steps), rows=len(rows), trained=trained)
    return {
        "epsilon": None if epsilon == INFINITE else epsilon,
        "seed": seed,
        "train_rows": len(rows),
        "steps": steps,
        "sampling_rate": private.privacy.sampling_rate,
        "learning_rate": train.learning_rate,
        "noise_multiplier": round(private.privacy.noise_multiplier, 4),
        "trained": trained,
        "nu": round(nu, 3),
        "f1": round(scores["f1"], 4),
        "parse_rate": round(scores["parse_rate"], 4),
        "loss": round(result.loss, 4),
        "cpu_seconds": round(seconds, 1),
    }


def federation(
    arguments: argparse.Namespace, kind: str, epsilon: float, seed: int
) -> dict[str, Any]:
    """Simulate a federation that shares the noise, and score it."""
    rows, test, start = clinic_rows(), clinic_rows("test"), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDFORA_PRIVACY_DIR"] = f"{folder}/ledgers"  # the rows are made up
        same: dict[str, Any] = {
            **{"model": "clinic-base", "quantization": "none", "seed": seed},
            "lora_rank": arguments.lora_rank,
        }
        if kind == "public":
            others = [row for row in rows if row["specialty"] != PRIVATE_CLINIC]
            test = [row for row in test if row["specialty"] == PRIVATE_CLINIC]
            rows = notes_of_sites(arguments.sites)
            fedfora.train(
                train_file=others,
                output_dir=f"{folder}/public",
                max_target_length=64,
                learning_rate=PUBLIC.learning_rate,
                per_device_train_batch_size=PUBLIC.per_device_train_batch_size,
                gradient_accumulation_steps=1,
                max_steps=PUBLIC.max_steps,
                **same,
            )
            start = {"start_adapter": f"{folder}/public"}
        started = time.process_time()
        run = fedfora.simulate(
            train_file=rows,
            test_file=test[: arguments.test_rows],
            output_dir=f"{folder}/run",
            max_target_length=64,
            partition=f"by-column:{'site' if kind == 'public' else 'specialty'}",
            num_rounds=arguments.steps if arguments.steps > 0 else 120,
            local_steps=1,
            eval_rounds=1000,
            privacy_unit="record",
            target_epsilon=None if epsilon == INFINITE else epsilon,
            noise_multiplier=0.0 if epsilon == INFINITE else None,
            sampling_rate=arguments.sampling_rate,
            learning_rate=arguments.learning_rate,
            shared_noise=True,
            secure_aggregation=True,
            secagg_threshold=arguments.secagg_threshold,
            weighting="equal",
            **same,
            **start,
        )
        return {
            "start": kind,
            "epsilon": None if epsilon == INFINITE else epsilon,
            "seed": seed,
            "sites": arguments.sites,
            "train_rows": len(rows),
            "f1": round(run.scores["f1"], 4),
            "parse_rate": round(run.scores["parse_rate"], 4),
            "cpu_seconds": round(time.process_time() - started, 1),
        }


def notes_of_sites(sites: int) -> list[dict[str, str]]:
    """Return 600 new notes of the private clinic for each site."""
    notes = new_notes({PRIVATE_CLINIC}, 600 * sites)
    return [note | {"site": f"site-{place // 600}"} for place, note in enumerate(notes)]


def new_notes(names: set[str], count: int) -> list[dict[str, str]]:
    """Return notes of these clinics in turn, none of them a test note."""
    specialties = [each for each in SPECIALTIES if each.name in names]
    tested = {row["input"] for row in clinic_rows("test")}
    rng = random.Random("clinic:private sites")
    notes: list[dict[str, str]] = []
    while len(notes) < count:
        specialty = specialties[len(notes) % len(specialties)]
        note = note_row(specialty, draw_facts(specialty, rng), rng)
        if note["input"] not in tested:
            notes.append(note)
    return notes


def cost_of_a_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return processor time of a private row over that of a plain one, in passes of one size."""
    site = prepare("scratch", 0, arguments.lora_rank)
    encoded = sorted(site["rows"], key=lambda row: len(row["input_ids"]))
    rows = encoded[len(encoded) // 2 :][:TIMED_ROWS]  # of like length, so neither pads more
    train = TrainArguments(per_device_train_batch_size=TIMED_ROWS, gradient_accumulation_steps=1)
    hidden = RecordPrivacy(1.0, 1.0, TIMED_ROWS, TIMED_ROWS)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(arguments.pairs):
        for private in (False, True) if pair % 2 else (True, False):
            started = time.process_time()
            train_locally(
                site["model"],
                rows,
                replace(train, learning_rate=1e-3),
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
