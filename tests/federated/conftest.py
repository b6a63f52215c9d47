"""Settings for federations that take a second, and a way to make one of their sites misbehave."""

import json

import pytest

from fedfora.data.clinic import clinic_rows
from fedfora.federated import simulation
from fedfora.federated.settings import from_run_config


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory):
    """Ten notes of each clinic, so that no test waits for 2,400 to be encoded."""
    by_clinic = {}
    for row in clinic_rows():
        by_clinic.setdefault(row["specialty"], []).append(row)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [row for notes in by_clinic.values() for row in notes[:10]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tiny_dir, few_rows, tmp_path):
    """A function from flags to the settings of a small federation."""

    def make(**flags):
        return from_run_config(
            {
                "model_name_or_path": tiny_dir,
                "quantization": "none",
                "train_file": few_rows,
                "partition": "by-column:specialty",
                "output_dir": str(tmp_path / "out"),
                "lora_rank": 2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "num_rounds": 2,
                "local_steps": 1,
                **flags,
            }
        )

    return make


@pytest.fixture
def misbehave(monkeypatch):
    """Let `behavior(honest_app, message, context)` answer in a site's place from a round on.

    `honest_app(message, context)` is what the site would have answered.
    """

    def install(behavior, *, site=2, from_round=1):
        make = simulation.make_client_app

        def make_app(*args, **kwargs):
            honest = make(*args, **kwargs)

            def app(message, context):
                trains = message.metadata.message_type == "train"
                if not trains or context.node_config["partition-id"] != site:
                    return honest(message, context)
                if message.content["config"]["round-index"] + 1 < from_round:
                    return honest(message, context)
                return behavior(honest, message, context)

            return app

        monkeypatch.setattr(simulation, "make_client_app", make_app)

    return install
