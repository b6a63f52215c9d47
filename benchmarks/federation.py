"""What aggregation rules, travel formats and robust combinations are worth on the clinic task.

Held-out F1, the error meter and the bytes of simulated federations; central training and clinics on
their own beside them; sites that flip or inflate what they learned; and, from the shapes alone, the
bytes of an 8B model. Every finished run is written at once, so an interrupted benchmark says what
it did.

    OMP_NUM_THREADS=1 python benchmarks/federation.py --suites quality formats robustness-x100
"""

import argparse
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from fedfora import ForaConfig
from fedfora.adapter.state import fold, unfold
from fedfora.cli.console import silence_libraries
from fedfora.data.loading import load_examples
from fedfora.evaluation.evaluate import evaluate
from fedfora.federated.comparison import compare
from fedfora.federated.settings import FederationSettings, from_run_config
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.federated.site import client_app
from fedfora.federated.site_runtime import load_runtime
from fedfora.models.saving import read_adapter
from fedfora.reporting.view import View
from record import write

SILENT = View(1, Console(quiet=True))
TASK: dict[str, Any] = {
    "model_name_or_path": "clinic-base",
    "quantization": "none",
    "train_file": "clinic",
    "test_file": "clinic:test",
    "lora_rank": 8,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 120,
    "max_target_length": 64,
    "save_total_limit": 1,
    "overwrite_output_dir": True,
}
BY_SPECIALTY = {"partition": "by-column:specialty"}
FOUR = {"partition": "iid", "num_clients": 4}
FIVE = {"partition": "iid", "num_clients": 5}
TWENTY = {"partition": "dirichlet:specialty:0.3", "num_clients": 20, "clients_per_round": 5}
TWENTY_IID = {"partition": "iid", "num_clients": 20, "clients_per_round": 5}
EVERY_RULE: list[tuple[str, dict[str, Any]]] = [
    ("fedavg", {}),
    ("refactor", {}),
    ("core", {}),
    ("core", {"lora_rank": 32}),
    ("ffa", {}),
]


@dataclass(frozen=True)
class Job:
    """One federation: a name, its flags, and what malicious sites do to what they learned."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    attack: float | None = None
    attackers: int = 0


def rule(name: str, sites: dict[str, Any], where: str, **flags: Any) -> Job:
    """A federation under a rule."""
    described = " ".join([name, *(f"{key}={value}" for key, value in flags.items())])
    return Job(f"{described}, {where}", {"aggregation": name, **sites, **flags})


SUITES: dict[str, list[Job]] = {
    "quality": [
        rule("refactor", BY_SPECIALTY, "4 specialties"),
        rule("core", BY_SPECIALTY, "4 specialties"),
        rule("ffa", BY_SPECIALTY, "4 specialties"),
    ],
    "formats": [
        rule("fedavg", BY_SPECIALTY, "4 specialties", update_dtype="int8"),
        rule("fedavg", BY_SPECIALTY, "4 specialties", update_dtype="int4"),
        rule("refactor", BY_SPECIALTY, "4 specialties", update_dtype="int8"),
    ],
    "ranks": [
        rule("refactor", BY_SPECIALTY, "4 specialties", site_ranks="2 4 8 8"),
    ],
    "cores": [
        rule("core", BY_SPECIALTY, "4 specialties", lora_rank=32),
    ],
    "servers": [
        rule("fedavg", BY_SPECIALTY, "4 specialties", server_optimizer="momentum",
             server_momentum=0.5),
        rule("fedavg", BY_SPECIALTY, "4 specialties", server_optimizer="adam",
             server_learning_rate=0.01),
        rule("fedavg", BY_SPECIALTY, "4 specialties", proximal_mu=0.1),
    ],
}  # fmt: skip
BESIDE = {"beside": rule("fedavg", BY_SPECIALTY, "4 specialties")}
for suite, sites, where in (
    ("iid", FOUR, "4 iid"),
    ("twenty", TWENTY, "20 dirichlet 0.3, 5 a round"),
    ("twenty-iid", TWENTY_IID, "20 iid, 5 a round"),
):
    BESIDE[f"beside-{suite}"] = rule("fedavg", sites, where)
    SUITES[suite] = [rule(name, sites, where, **flags) for name, flags in EVERY_RULE]
for what, factor in (("x100", 100.0), ("flipped", -1.0)):
    SUITES[f"robustness-{what}"] = [
        Job(
            f"{how}, 1 of 5 {what}",
            {"aggregation": "fedavg", "robust": how, "max_norm_ratio": 0.0, **FIVE},
            attack=factor,
            attackers=1,
        )
        for how in ("none", "median", "trimmed-mean", "multi-krum")
    ]
SUITES["robustness-baselines"] = [
    Job("none, 5 honest", {"aggregation": "fedavg", **FIVE}),
    Job("none, screened by length, 1 of 5 x100", {**FIVE}, attack=100.0, attackers=1),
]


def settings(flags: dict[str, Any], rounds: int, out: str) -> FederationSettings:
    """The task with some flags; scores after the last round alone."""
    schedule = {"num_rounds": rounds, "local_steps": 5, "eval_rounds": rounds}
    return from_run_config({**TASK, **schedule, "output_dir": out, **flags})


@contextmanager
def malicious(attackers: int, factor: float | None) -> Any:
    """Let the first sites send what they received plus `factor` times what they learned."""
    honest = client_app.train_round

    def train_round(runtime: Any, site: Any, adapter: Any, **options: Any) -> Any:
        state, result = honest(runtime, site, adapter, **options)
        if factor is None or site.index >= attackers:
            return state, result
        learned = fold(state)
        sent = {name: adapter[name] + factor * (learned[name] - adapter[name]) for name in learned}
        return unfold(sent, seed=runtime.settings.train.seed), result

    client_app.train_round = train_round
    try:
        yield
    finally:
        client_app.train_round = honest


def run(job: Job, rounds: int, seed: int) -> dict[str, Any]:
    """Simulate a job and return its figures."""
    with tempfile.TemporaryDirectory() as out, malicious(job.attackers, job.attack):
        chosen = settings({"seed": seed, **job.flags}, rounds, out)
        started = time.perf_counter()
        try:
            simulate(chosen, SILENT)
        except ValueError as error:
            return {"name": job.name, "seed": seed, "failed": str(error)}
        figures = {"name": job.name, "seed": seed, **figures_of(read_rounds(out))}
        own = sorted(
            (Path(out) / "sites").glob("*/adapter"), key=lambda path: int(path.parent.name)
        )
        if own and job.flags["partition"] == BY_SPECIALTY["partition"]:
            figures["f1_of_each_site_on_its_own_test_rows"] = own_scores(chosen, own, "specialty")
        elif own:
            figures["f1_of_four_sites_own_adapters"] = own_scores(chosen, own[:4])
        return figures | {"seconds": round(time.perf_counter() - started)}


def figures_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Score, error and bytes of a run's rounds; bytes per site are those of the last round."""
    errors = [line["aggregation_error"] for line in lines if "aggregation_error" in line]
    sites = lines[-1]["sites"]
    return {
        "f1": lines[-1]["scores"]["f1"],
        "loss": lines[-1]["loss"],
        "aggregation_error": {"mean": mean(errors), "last": errors[-1]} if errors else None,
        "uplink_bytes_per_site": mean(site["uplink_bytes"] for site in sites),
        "downlink_bytes_per_site": mean(site["downlink_bytes"] for site in sites),
        "uplink_bytes": sum(line["uplink_bytes"] for line in lines),
        "downlink_bytes": sum(line["downlink_bytes"] for line in lines),
        "rounds": len(lines),
        "rejected": sum(len(line["rejected"]) for line in lines),
        "least_cosine_of_each_round": [
            min(site["cosine"] for site in line["sites"])
            for line in lines
            if "cosine" in line["sites"][0]
        ],
    }


def own_scores(
    chosen: FederationSettings, adapters: list[Path], column: str | None = None
) -> list[float]:
    """F1 of sites' own adapters on all test rows, or each on the rows of its value of a column."""
    runtime = load_runtime(chosen.run_config())
    rows = load_examples("clinic:test", chosen.data)
    parts = [rows] * len(adapters)
    if column is not None:
        seen = (row.columns[column] for row in load_examples("clinic", chosen.data))
        parts = [
            [row for row in rows if row.columns[column] == name] for name in dict.fromkeys(seen)
        ]
    scores = []
    for adapter, own in zip(adapters, parts, strict=True):
        runtime.load(fold(read_adapter(adapter)))
        scored = evaluate(
            runtime.model,
            runtime.base.tokenizer,
            own,
            runtime.prompts,
            batch_size=120,
            max_new_tokens=chosen.evaluation.max_new_tokens,
        )
        scores.append(scored.scores["f1"])
    return scores


def beside(job: Job, rounds: int, seed: int) -> dict[str, Any]:
    """Base, each site alone, federated and central, with as many steps."""
    with tempfile.TemporaryDirectory() as out:
        chosen = settings({"seed": seed, "compare": "base alone central", **job.flags}, rounds, out)
        rows = compare(chosen, SILENT)
        figures = {"name": job.name, "seed": seed, **figures_of(read_rounds(out))}
    return {
        "seed": seed,
        **{row.kind: row.scores["f1"] for row in rows if row.kind in ("base", "central")},
        "alone": {row.name: row.scores["f1"] for row in rows if row.kind == "alone"},
        "fedavg": figures,
    }


def bytes_of_8b(rank: int) -> dict[str, Any]:
    """Bytes of a round for the shape of Llama 3 8B, all linear layers, in float32, from shapes."""
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        )
    model = get_peft_model(base, ForaConfig(r=rank), low_cpu_mem_usage=True)
    counts = dict.fromkeys("ADE", 0)
    for name, parameter in model.named_parameters():
        for factor in counts:
            counts[factor] += parameter.numel() if f"fora_{factor}." in name else 0
    lora, core = 4 * (counts["A"] + counts["D"]), 4 * counts["E"]
    return {"rank": rank, "lora_bytes": lora, "core_bytes": core, "ratio": core / lora}


def main() -> None:
    """Run the suites asked for, and write the figures after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=[*SUITES, *BESIDE])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", help="jobs whose name begins so")
    parser.add_argument("--results", default="federation")
    options = parser.parse_args()
    silence_libraries()
    figures: dict[str, Any] = {
        "task": {**TASK, "num_rounds": options.rounds, "local_steps": 5},
        "bytes_8b": bytes_of_8b(16),
        "beside": [],
        "runs": [],
    }
    write(options.results, figures)
    for seed in options.seeds:
        for suite in options.suites:
            if suite in BESIDE:
                figures["beside"].append(beside(BESIDE[suite], options.rounds, seed))
                write(options.results, figures)
                continue
            for job in SUITES[suite]:
                if options.only and not job.name.startswith(options.only):
                    continue
                figures["runs"].append({"suite": suite, **run(job, options.rounds, seed)})
                write(options.results, figures)


if __name__ == "__main__":
    main()
