"""The board: real rows on natural sites, a cell for each data set, arm and seed.

    python benchmarks/board.py --data ade --data_dir DIR --model_name_or_path model.gguf \
        --arms base base-3 alone fedavg refactor central --seeds 1

A finished cell is a line of benchmarks/results/board/DATA.jsonl, so an interrupted board resumes.
Every trained arm has the same number of trials (`--rates`), judged by the validation loss on rows
held out at the sites it trains on; test rows are answered once. One site (`--unseen`, the last by
name) trains nothing: its test rows are scored apart. `--summary` compares the arms row by row.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedfora.adapter.state import fold
from fedfora.cli.console import silence_libraries
from fedfora.data.encoding import prompt_format_of
from fedfora.data.loading import Example, load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.evaluate import Evaluation, evaluate
from fedfora.evaluation.scores import interval, resampled_sums
from fedfora.federated.settings import FederationSettings, from_run_config
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.federated.site_runtime import load_runtime, open_site
from fedfora.metrics import METRICS, Answer, headlines
from fedfora.models.saving import read_adapter
from fedfora.reporting.record import peak_memory_bytes, reset_peak_memory
from fedfora.reporting.view import View
from fedfora.training.schedule import StepWindow

RESULTS = Path(__file__).parent / "results" / "board"
SILENT = View(1, Console(quiet=True))
COLUMNS = {
    "ade": "era",
    "ade-kinds": "kind",
    "medquad": "institute",
    "mts": "section",
    "pubmedqa": "year",
    "clinic": "specialty",
}
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "refactor": {"aggregation": "refactor"},
    "core": {"aggregation": "core"},
    "fedavg-momentum": {"server_optimizer": "momentum", "server_momentum": 0.5},
    "fedavg-momentum-0.8": {"server_optimizer": "momentum", "server_momentum": 0.8},
}
ARMS = ("base", "base-3", "alone", *RULES, "central")
OTHERS = "others"
EVAL_BATCH = 32  # a step of decoding reads the whole base, for one row or for many


class Board:
    """The rows of a data set on its sites, and what trains and answers on them."""

    def __init__(self, data: str, options: argparse.Namespace, scratch: Path) -> None:
        """Read the rows; sites with fewer than `--min_rows_per_site` become one."""
        self.data, self.options, self.scratch = data, options, scratch
        train, self.test = (self._rows(split) for split in ("train", "test"))
        sites: dict[str, list[dict[str, Any]]] = {}
        for example in train:
            sites.setdefault(self._kind(example), []).append(example.columns)
        if options.max_site_rows:
            draw = random.Random(1).sample
            sites = {n: draw(r, min(len(r), options.max_site_rows)) for n, r in sites.items()}
        small = [n for n, rows in sites.items() if len(rows) < options.min_rows_per_site]
        for name in small:
            sites.setdefault(OTHERS, []).extend(sites.pop(name))
        self.unseen = options.unseen or max(sites)
        if self.unseen not in sites or len(sites) < 3:
            raise ValueError(f"--unseen {self.unseen}: needs one of 3 sites: {', '.join(sites)}")
        self.names = set(sites)
        del sites[self.unseen]
        self.sites = dict(sorted(sites.items()))
        self.shots = [e for e in train if self._site(e) in sites][:3]

    def _rows(self, split: str) -> list[Example]:
        bundled = self.data == "clinic"
        file = Path(self.options.data_dir or "") / f"{self.data.partition('-')[0]}_{split}.json"
        if not bundled and not file.is_file():
            raise ValueError(f"--data_dir: no {file} (examples/medical makes it)")
        rows = load_examples(f"clinic:{split}" if bundled else str(file), DataArguments())
        count = min(self.options.max_test_rows, len(rows))
        # Files lie in the order of their sites: draw, or some sites have no test rows at all.
        drawn = sorted(random.Random(1).sample(range(len(rows)), count))
        return [rows[i] for i in drawn] if split == "test" else rows

    def _kind(self, example: Example) -> str:
        return str(example.columns.get(COLUMNS[self.data]))

    def _site(self, example: Example) -> str:
        kind = self._kind(example)
        return kind if kind in self.names else OTHERS

    def settings(
        self, sites: list[str], seed: int, rate: float, **flags: Any
    ) -> FederationSettings:
        """Return a federation of some sites; as a single one where `central` pools their rows."""
        rows = [{**row, "board_site": name} for name in sites for row in self.sites[name]]
        # A file of its own for these sites: what was read from a path is kept for the process.
        file = (
            self.scratch / f"train-{'-'.join(str(list(self.sites).index(n)) for n in sites)}.json"
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = self.options
        chosen = {
            "model_name_or_path": options.model_name_or_path,
            "quantization": options.quantization,
            "train_file": str(file),
            "partition": "by-column:board_site",
            "num_rounds": options.rounds,
            "local_steps": options.local_steps,
            "validation_fraction": 0.1,
            "per_device_train_batch_size": options.batch,
            "gradient_accumulation_steps": 1,
            "lora_rank": options.rank,
            "max_source_length": options.max_source_length,
            "max_target_length": options.max_target_length,
            "learning_rate": rate,
            "aggregation": "fedavg",
            "seed": seed,
            "output_dir": str(self.scratch / "run"),
            "overwrite_output_dir": True,
        }
        return from_run_config({**chosen, **flags})

    def cell(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the figures of an arm; `alone` has those of each site."""
        names = list(self.sites)
        if arm == "alone":
            return {"sites": {name: self._measured([name], seed, {}) for name in names}}
        pooled = {"partition": "iid", "num_clients": 1, "gradient_accumulation_steps": len(names)}
        return self._measured(names, seed, pooled if arm == "central" else RULES.get(arm), arm)

    def _measured(
        self, sites: list[str], seed: int, flags: dict[str, Any] | None, arm: str = ""
    ) -> dict[str, Any]:
        """Tune, train and answer; nothing is trained where there are no flags."""
        reset_peak_memory()
        started, trials, best = time.monotonic(), [], None
        for rate in self.options.rates if flags is not None else ():
            settings = self.settings(sites, seed, rate, **flags)
            shutil.rmtree(settings.run.output_dir, ignore_errors=True)
            simulate(settings, SILENT)
            rounds = read_rounds(settings.run.output_dir)
            loss = rounds[-1]["validation_loss"]
            trials.append({"learning_rate": rate, "validation_loss": loss})
            if best is None or loss < best[0]:
                sent = sum(line["uplink_bytes"] for line in rounds)
                best = loss, fold(read_adapter(settings.run.output_dir)), sent
        runtime = load_runtime(self.settings(sites, seed, self.options.rates[0]).run_config())
        runtime.load(best[1] if best else runtime.fresh)
        result = self._answered(runtime, self.shots if arm == "base-3" else [])
        return self._figures(result) | {
            "trials": trials,
            "uplink_bytes": best[2] if best else 0,
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _answered(self, runtime: Any, shots: list[Example]) -> Evaluation:
        history = tuple((shot.prompt, shot.output or "") for shot in shots)
        data = replace(
            runtime.settings.data,
            max_source_length=self.options.max_source_length * (1 + len(shots)),
        )
        return evaluate(
            runtime.model,
            runtime.base.tokenizer,
            [replace(example, history=history) for example in self.test],
            prompt_format_of(data, runtime.base.tokenizer),
            batch_size=EVAL_BATCH,
        )

    def _figures(self, result: Evaluation) -> dict[str, Any]:
        """Return scores on all rows of seen sites, the sites' mean, the worst, and the unseen."""
        headline, groups = headlines(result.scores)[0], {}
        for index, example in enumerate(self.test):
            groups.setdefault(self._site(example), []).append(index)
        unseen = groups.pop(self.unseen, [])
        seen = sorted(index for rows in groups.values() for index in rows)
        answers = [
            Answer(text, example.output or "", example.prompt)
            for text, example in zip(result.predictions, self.test, strict=True)
        ]
        by_site = {n: result.scores_of(rows)[headline] for n, rows in groups.items()}
        return {
            "headline": headline,
            "scores": result.scores_of(seen),
            "by_site": by_site,
            "mean": sum(by_site.values()) / len(by_site),
            "worst": min(by_site.values()),
            "unseen": result.scores_of(unseen).get(headline) if unseen else None,
            "counts": [list(METRICS[headline].counts(answers[index])) for index in seen],
        }

    def seconds_of_a_cell(self) -> float:
        """Return about how long a trained cell takes here, from one step and a few answers."""
        options, name = self.options, next(iter(self.sites))
        settings = self.settings([name], 1, options.rates[0])
        runtime, ends = load_runtime(settings.run_config()), []
        window = StepWindow(first_step=0, num_steps=2, total_steps=2)
        runtime.train(
            runtime.fresh,
            open_site(runtime, 0).encoded,
            settings.train,
            stretch=window,
            seed=1,
            on_step=lambda report: ends.append(time.monotonic()),
        )
        test, self.test = self.test, self.test[:EVAL_BATCH]
        started = time.monotonic()
        self._answered(runtime, [])
        answer_s = (time.monotonic() - started) / len(self.test)
        self.test = test
        steps = len(options.rates) * len(self.sites) * options.rounds * options.local_steps
        return steps * (ends[1] - ends[0]) + answer_s * len(test)


def summary(lines: list[dict[str, Any]], reference: str) -> dict[str, Any]:
    """Return each arm's score minus the reference's, with 95 % intervals of paired rows."""
    by_arm: dict[str, list[Any]] = {}
    for line in lines:
        for name, figures in line.get("sites", {"": line}).items():
            by_arm.setdefault(f"{line['arm']} {name}".strip(), []).append(figures)
    if reference not in by_arm:
        return {}
    total = METRICS[by_arm[reference][0]["headline"]].total
    theirs = sum(np.array(figures["counts"], dtype=float) for figures in by_arm[reference])
    differences = {}
    for arm, cells in by_arm.items():
        ours = sum(np.array(figures["counts"], dtype=float) for figures in cells)
        width = ours.shape[1]
        sums = resampled_sums(np.concatenate([ours, theirs], axis=1), seed=1)

        def difference(both: Any, width: int = width) -> float:
            return total(both[:width]) - total(both[width:])

        low, high = interval(sums, difference)
        point = total(ours.sum(axis=0).tolist()) - total(theirs.sum(axis=0).tolist())
        differences[arm] = {"difference": point, "interval": [low, high], "seeds": len(cells)}
    return differences


def main() -> None:
    """Run the cells that are not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=COLUMNS, default=["ade"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--data_dir", help="rows as examples/medical writes them")
    parser.add_argument("--model_name_or_path", default="clinic-base")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--unseen", help="the site that trains nothing")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--reference", default="central", help="what --summary compares with")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="clinic rows, a round of one step")
    for name, value in {
        "rounds": 8, "local_steps": 8, "batch": 4, "rank": 8, "min_rows_per_site": 50,
        "max_site_rows": 0, "max_test_rows": 10**9,
        "max_source_length": 384, "max_target_length": 128,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.tiny:
        options.data, options.model_name_or_path, options.rates = ["clinic"], "clinic-base", [1e-2]
        options.rounds = options.local_steps = 1
        options.max_test_rows, options.max_target_length = 8, 8
    silence_libraries()
    for data in options.data:
        run(data, options)


def run(data: str, options: argparse.Namespace) -> None:
    """Run the missing cells of a data set, or summarize those that are there."""
    file = options.results_dir / f"{data}.jsonl"
    setup = {
        name: value
        for name, value in vars(options).items()
        if name not in ("data", "arms", "seeds", "results_dir", "summary", "reference", "data_dir")
    } | {"model_name_or_path": Path(options.model_name_or_path).name}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    done = [line for line in map(json.loads, lines) if line["setup"] == setup]
    if options.summary:
        print(json.dumps(summary(done, options.reference), indent=2))
        return
    there = {(line["arm"], line["seed"]) for line in done}
    todo = [(a, s) for a in options.arms for s in options.seeds if (a, s) not in there]
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        board = Board(data, options, Path(scratch))
        trained = sum(arm not in ("base", "base-3") for arm, _ in todo)
        minutes = trained * board.seconds_of_a_cell() / 60 if trained else 0
        print(f"{data}: {len(todo)} cells, about {minutes:.0f} minutes here for {trained} trained")
        for arm, seed in todo:
            line = {"arm": arm, "seed": seed, "setup": setup, **board.cell(arm, seed)}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            scores = [f["scores"][f["headline"]] for f in line.get("sites", {"": line}).values()]
            print(f"{data} {arm} seed {seed}: {', '.join(f'{s:.3f}' for s in scores)}", flush=True)


if __name__ == "__main__":
    main()
