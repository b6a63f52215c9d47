"""A run's rounds for TensorBoard, MLflow, Weights & Biases or trackio: listeners of its record.

They hear what metrics.jsonl keeps and nothing else: what privacy keeps out of the one is not in the
other. `fedfora train` leaves its steps to transformers' own integrations.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedfora.registry import unknown
from fedfora.reporting.history import curves_of
from fedfora.reporting.record import Event, Listener

PROJECT = "fedfora"
# What transformers reports to beside `TRACKERS`: only `fedfora train` does. Name to package.
_ALIKE = "clearml codecarbon comet_ml dagshub dvclive neptune swanlab"
OF_TRANSFORMERS = {n: n for n in _ALIKE.split()} | {"azure_ml": "azureml", "flyte": "flytekit"}
KUBEFLOW, KUBEFLOW_SERVER = "kubeflow", "KUBEFLOW_TRAINER_SERVER_URL"  # needs this and no package
OF_TRANSFORMERS[KUBEFLOW] = "transformers"
Make = Callable[[Path, Mapping[str, Any]], Any]  # gives `log(values, step)` and `finish()`


def trackers(names: list[str], directory: Path, config: Mapping[str, Any]) -> list[Listener]:
    """Return listeners that report to the trackers named, of `TRACKERS`; none for "none".

    Raises:
        ValueError: If a name is unknown or a package is missing, with the command that installs it.
    """
    check_trackers(names)
    return [_listener(TRACKERS[name](directory, config)) for name in names if name != "none"]


def check_trackers(names: list[str], more: Mapping[str, str] | None = None) -> None:
    """Raise if a tracker, of `TRACKERS` or `more`, is unknown or not installed, with the remedy."""
    packages = {name: name for name in ("none", *TRACKERS)} | dict(more or {})
    for name in names:
        if name not in packages:
            raise ValueError(f"--report_to: {unknown('tracker', name, packages)}")
        if name == "none" and len(names) > 1:
            raise ValueError("--report_to none cannot be combined with trackers")
        if name == KUBEFLOW and KUBEFLOW_SERVER not in os.environ:
            raise ValueError(f"--report_to {name}: only in a Kubeflow TrainJob ({KUBEFLOW_SERVER})")
        if name != "none" and find_spec(packages[name]) is None:
            raise ValueError(f"--report_to {name} needs: pip install {packages[name]}")


def _listener(tracker: Any) -> Listener:
    """Return a listener that logs a round's numbers; loss.sites/NAME is a site's own."""

    def hear(event: Event) -> None:
        if event["event"] == "finished":
            tracker.finish()
        elif event["event"] == "round":
            values = {
                f"{name}.sites/{site}" if site else name: points[0][1]
                for name, measured in curves_of([event]).of.items()
                for site, points in measured.items()
            }
            tracker.log(values, step=event["round"])

    return hear


def _tensorboard(directory: Path, config: Mapping[str, Any]) -> Any:
    """Return a tracker that writes into the run directory; files of an earlier start stay apart."""
    from torch.utils.tensorboard import SummaryWriter

    start = time.strftime("%Y%m%d-%H%M%S")
    writer = SummaryWriter(str(directory / "tensorboard" / start))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return SimpleNamespace(log=log, finish=writer.close)


def _mlflow(directory: Path, config: Mapping[str, Any]) -> Any:
    """Return a tracker of a run on the server that MLFLOW_TRACKING_URI names."""
    mlflow = import_module("mlflow")
    mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=directory.resolve().name)
    mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def log(values: dict[str, float], step: int) -> None:
        allowed = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in values.items()}
        mlflow.log_metrics(allowed, step=step)

    return SimpleNamespace(log=log, finish=mlflow.end_run)


def _wandb_like(package: str, directory: Path, config: Mapping[str, Any]) -> Any:
    """Return wandb, or trackio, which has the same interface, for a run."""
    tracker = import_module(package)
    tracker.init(project=PROJECT, name=directory.resolve().name, config=dict(config))
    return tracker


TRACKERS: dict[str, Make] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": partial(_wandb_like, "wandb"),
    "trackio": partial(_wandb_like, "trackio"),
}
