"""The evaluation card: a run's results as data. `card.schema.json` says what it holds.

It is made from the run's record alone, so a card can be made again from any run directory.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fedfora.reporting.history import Run, sites_of
from fedfora.reporting.record import Event

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
    environment, training = run.environment, _settings(run, "train", _TRAINING)
    # What had an effect: steps by number, or passes.
    training.pop("num_train_epochs" if training.get("max_steps", -1) > 0 else "max_steps", None)
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
        "training": training,
        "rows": _rows(run),
        "privacy": privacy_of(run.events),
        "environment": {
            key: environment.get(key) for key in ("command", "seed", "python", "packages")
        },
        "seconds": max((line["seconds"] for line in run.events if "seconds" in line), default=None),
    }
    if run.config.get("federation"):
        card["federation"] = _federation(run)
    return card


def privacy_of(events: Iterable[Event]) -> dict[str, Any]:
    """Return what was spent of the privacy budget, and that in words.

    Args:
        events: The run's events. The last that says `epsilon`, at its top or one level below, says
            what was spent in all; so with `delta` and with the sentence in `privacy_statement`, or
            `statement` beside them.
    """
    spent: dict[str, Any] = {"epsilon": None, "delta": None, "statement": None}
    for line in events:
        for values in (line, *(value for value in line.values() if isinstance(value, Mapping))):
            if not {"epsilon", "privacy_statement"} & set(values):
                continue
            statement = values.get("privacy_statement", values.get("statement"))
            spent = {
                "epsilon": values.get("epsilon", spent["epsilon"]),
                "delta": values.get("delta", spent["delta"]),
                "statement": statement or spent["statement"],
            }
    if not spent["statement"]:
        spent["statement"] = "No differential privacy."
        if (epsilon := spent["epsilon"]) is not None:
            with_delta = "" if spent["delta"] is None else f", delta = {spent['delta']:g}"
            spent["statement"] = f"Differentially private with epsilon = {epsilon:.3g}{with_delta}."
    return spent


def _settings(run: Run, section: str, names: Iterable[str]) -> dict[str, Any]:
    values = {name: run.setting(section, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _rows(run: Run) -> list[dict[str, Any]]:
    """Return one row for each way of training that was scored.

    A comparison records them. A federation alone has one, its last evaluation; a prediction run has
    its scores.
    """
    rows = [{k: v for k, v in r.items() if k not in ("event", "time")} for r in run.of("row")]
    scored = [line for line in run.of("round") if line.get("scores")]
    if scored and not any(row["kind"] == "federated" for row in rows):
        rows.append(_row("federated", scored[-1]["scores"], run))
    return rows or ([_row("scored", run.scores, run)] if run.scores else [])


def _row(name: str, scores: dict[str, Any], run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "kind": name, "scores": scores}
    for line in run.of("finished"):
        row |= {k: line[k] for k in ("peak_memory_bytes", "wall_seconds") if k in line}
    return row


def _federation(run: Run) -> dict[str, Any]:
    rounds = run.of("round")
    sites = [site for line in rounds for site in sites_of(line)]
    down = sum(
        site.get("downlink_bytes") or line.get("downlink_bytes_per_site") or 0
        for line in rounds
        for site in sites_of(line)
    )
    up = sum(site.get("uplink_bytes", 0) for site in sites)
    settings = run.config["federation"] | run.config.get("aggregation", {})
    return {
        "sites": list(dict.fromkeys(str(site["site"]) for site in sites)),
        "rounds": len(rounds),
        "settings": {name: value for name, value in settings.items() if value is not None},
        "uplink_bytes": up,
        "downlink_bytes": down,
        "uplink_bytes_per_round_and_site": up / len(sites) if sites else None,
    }
