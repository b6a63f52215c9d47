"""Trackers get what the record keeps of every round, read back by their own readers."""

import pytest

from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.reporting.record import RunRecord
from fedfora.reporting.trackers import OF_TRANSFORMERS, TRACKERS, check_trackers, trackers
from fedfora.reporting.view import View
from rounds import round_line


def record_of(tmp_path, name, events):
    directory = tmp_path / "north run"
    record = RunRecord(directory, overwrite=False)
    record.listeners = trackers([name], directory, {"seed": 42})
    for event in events:
        record.log(**event)
    return directory


def test_tensorboard_reads_the_rounds_of_a_simulation(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {
        "model_name_or_path": "clinic-base",
        "quantization": "none",
        "train_file": "clinic",
        "partition": "by-column:specialty",
        "num_rounds": 2,
        "local_steps": 1,
        "lora_rank": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "report_to": "tensorboard",
        "output_dir": str(tmp_path / "out"),
    }
    simulate(from_run_config(config), View(1))
    (written,) = (tmp_path / "out" / "tensorboard").iterdir()
    read = EventAccumulator(str(written)).Reload()
    rounds = read_rounds(tmp_path / "out")
    points = [(event.step, event.value) for event in read.Scalars("loss")]
    assert points == [(n, pytest.approx(line["loss"])) for n, line in enumerate(rounds, start=1)]
    site = rounds[0]["sites"][0]
    assert read.Scalars(f"loss.sites/{site['site']}")[0].value == pytest.approx(site["loss"])


def test_mlflow_reads_the_rounds(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    record_of(tmp_path, "mlflow", [round_line(1), round_line(2), {"event": "finished"}])
    (run,) = mlflow.search_runs(experiment_names=["fedfora"], output_format="list")
    assert run.data.tags["mlflow.runName"] == "north run"
    assert run.data.params["seed"] == "42"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 4.0), (2, 2.0)]
    assert run.data.metrics["loss.sites/north"] == 2.0
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_those_with_wandbs_interface_are_called_as_they_want(package, tmp_path, monkeypatch):
    tracker = pytest.importorskip(package, reason=f"needs pip install {package}")
    logged = []
    monkeypatch.setattr(tracker, "init", lambda **options: logged.append(options))
    monkeypatch.setattr(tracker, "log", lambda values, step: logged.append((step, values["loss"])))
    monkeypatch.setattr(tracker, "finish", lambda: logged.append("finished"))
    record_of(tmp_path, package, [round_line(1), round_line(2), {"event": "finished"}])
    start = {"project": "fedfora", "name": "north run", "config": {"seed": 42}}
    assert logged == [start, (1, 4.0), (2, 2.0), "finished"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], "did you mean 'tensorboard'"),
        (["none", "mlflow"], "none cannot be combined"),
        (["kubeflow"], r"unknown tracker 'kubeflow' \(known: none, tensorboard, mlflow, wandb, t"),
    ],
)
def test_mistakes_are_named(names, message):
    with pytest.raises(ValueError, match=message):
        check_trackers(names)


def test_train_takes_every_tracker_of_transformers(monkeypatch):
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) <= {*TRACKERS, *OF_TRANSFORMERS}
    with pytest.raises(ValueError, match=r"kubeflow: only in a Kubeflow TrainJob \(KUBEFLOW_TRAIN"):
        check_trackers(["kubeflow"], OF_TRANSFORMERS)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "https://127.0.0.1:9")
    check_trackers(["kubeflow"], OF_TRANSFORMERS)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("fedfora.reporting.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to wandb needs: pip install wandb"):
        check_trackers(["wandb"])
