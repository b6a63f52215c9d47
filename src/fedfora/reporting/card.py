"""The evaluation card: what a run came to, as data. `card.schema.json` says what it holds.

It is made from the run's record alone, so a card can be made again from any run directory.
"""

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedfora.reporting.history import Event, Run
from fedfora.reporting.series import sites_of

FORMAT_VERSION = 1
FILE = "card.json"

Card = dict[str, Any]

# Which settings tell the runs of a method apart, and where config.yaml holds them.
_ADAPTER = ("lora_rank", "lora_alpha", "inner_dim", "lora_dropout", "use_rslora", "target_modules")
_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "optim", "num_train_epochs"),
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
)


def card_of(run: Run) -> Card:
    """Return a run's card."""
    environment = run.environment
    card: Card = {
        "format": FORMAT_VERSION,
        "name": run.name,
        "kind": "federation" if run.config.get("federation") else "training",
        "base": {
            "name": run.setting("model", "model_name_or_path"),
            "quantization": run.setting("model", "quantization"),
            "fingerprint": environment.get("base_fingerprint"),
        },
        "data": {
            "train_file": run.setting("data", "train_file"),
            "test_file": run.setting("data", "test_file"),
        },
        "adapter": {"method": "FoRA", **_settings(run, "adapter", _ADAPTER)},
        "training": _settings(run, "train", _TRAINING),
        "rows": _rows(run),
        "privacy": privacy_of([*run.of("round"), *run.of("privacy")]),
        "environment": {
            key: environment.get(key) for key in ("command", "seed", "python", "packages")
        },
        "seconds": max((line["seconds"] for line in run.events if "seconds" in line), default=None),
    }
    if run.config.get("federation"):
        card["federation"] = _federation(run)
    return card


def schema() -> dict[str, Any]:
    """Return the card's JSON schema (draft 2020-12)."""
    text = files("fedfora.reporting").joinpath("card.schema.json").read_text(encoding="utf-8")
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def read_card(directory: str | Path) -> Card | None:
    """Return the card that lies in a directory; None where there is none."""
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    card: Card = json.loads(path.read_text(encoding="utf-8"))
    return card


def privacy_of(rounds: Iterable[Event]) -> dict[str, Any]:
    """Return what was spent of the privacy budget, and that in words.

    Args:
        rounds: The "round" and the "privacy" events. The last that says `epsilon`, at its top or
            one level below, says what was spent in all; a `statement` says it in words.
    """
    spent: dict[str, float] = {}
    stated = None
    for line in rounds:
        stated = line.get("statement", stated)
        for values in (line, *(value for value in line.values() if isinstance(value, Mapping))):
            spent |= {
                name: float(values[name])
                for name in ("epsilon", "delta")
                if isinstance(values.get(name), int | float)
            }
    if "epsilon" not in spent:
        return {
            "epsilon": None,
            "delta": None,
            "statement": "No differential privacy: the record holds no epsilon.",
        }
    delta = f", delta = {spent['delta']:g}" if "delta" in spent else ""
    statement = stated or f"Differentially private with epsilon = {spent['epsilon']:.3g}{delta}."
    return {"epsilon": spent["epsilon"], "delta": spent.get("delta"), "statement": statement}


def _settings(run: Run, section: str, names: Iterable[str]) -> dict[str, Any]:
    values = {name: run.setting(section, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _rows(run: Run) -> list[dict[str, Any]]:
    """Return one row for each way of training that was scored.

    A comparison records them. A federation alone has one, its last evaluation; a prediction run has
    its scores.
    """
    if compared := run.of("row"):
        return [{k: v for k, v in line.items() if k != "event"} for line in compared]
    scored = [line for line in run.of("round") if line.get("scores")]
    if scored:
        return [_row("federated", scored[-1]["scores"], run)]
    return [_row("scored", run.scores, run)] if run.scores else []


def _row(name: str, scores: dict[str, Any], run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "kind": name, "scores": scores}
    for line in run.of("finished"):
        row |= {k: line[k] for k in ("peak_memory_bytes", "wall_seconds") if k in line}
    return row


def _federation(run: Run) -> dict[str, Any]:
    rounds = run.of("round")
    sites = [site for line in rounds for site in sites_of(line)]
    names = list(dict.fromkeys(str(site["site"]) for site in sites))
    down = sum(
        site.get("downlink_bytes") or line.get("downlink_bytes_per_site") or 0
        for line in rounds
        for site in sites_of(line)
    )
    up = sum(site.get("uplink_bytes", 0) for site in sites)
    settings = run.config["federation"] | run.config.get("aggregation", {})
    return {
        "sites": names,
        "rounds": len(rounds),
        "settings": {name: value for name, value in settings.items() if value is not None},
        "uplink_bytes": up,
        "downlink_bytes": down,
        "uplink_bytes_per_round_and_site": up / len(sites) if sites else None,
    }
