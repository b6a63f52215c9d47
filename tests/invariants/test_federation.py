"""What must hold between a federation and ordinary training, on a float32 base."""

import pytest
import torch

from fedfora.adapter.state import fold
from fedfora.cli.main import main
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import simulate
from fedfora.models.saving import read_adapter
from fedfora.reporting.view import View

# One step of plain gradient descent over all rows of a site: what the mathematics speaks of.
FULL_BATCH_SGD = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "gradient_accumulation_steps": 1,
    "local_steps": 1,
    "num_rounds": 1,
}


@pytest.fixture
def rows(rows_file):
    from fedfora.data.clinic import clinic_rows

    return rows_file([dict(row, site="ab"[i % 3 == 0]) for i, row in enumerate(clinic_rows()[:24])])


@pytest.fixture
def federate(tiny_dir, rows, tmp_path):
    """A function that simulates with some flags and returns the folded adapter."""

    def run(name, **flags):
        settings = from_run_config(
            {
                "model_name_or_path": tiny_dir,
                "quantization": "none",
                "train_file": rows,
                "output_dir": str(tmp_path / name),
                "lora_rank": 2,
                "lora_dropout": 0.1,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "num_rounds": 1,
                "local_steps": 3,
                "num_clients": 1,
                "seed": 7,
                **flags,
            }
        )
        if "by-column" in settings.federation.partition:
            settings.federation.num_clients = None
        simulate(settings, View(1))
        return fold(read_adapter(tmp_path / name))

    return run


def assert_equal_to_the_bit(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_one_client_and_one_round_are_fedfora_train_to_the_bit(federate, tiny_dir, rows, tmp_path):
    federated = federate("federated")
    out = str(tmp_path / "train")
    status = main(
        f"train --model_name_or_path {tiny_dir} --quantization none --train_file {rows} "
        f"--output_dir {out} --lora_rank 2 --lora_dropout 0.1 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 2 --max_steps 3 --seed 7".split()
    )
    assert status == 0
    assert_equal_to_the_bit(federated, fold(read_adapter(out)))


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(federate):
    one = federate("one", num_clients=3, num_rounds=2, clients_per_round=2)
    assert_equal_to_the_bit(one, federate("same", num_clients=3, num_rounds=2, clients_per_round=2))
    other = federate("other", num_clients=3, num_rounds=2, clients_per_round=2, seed=8)
    assert not torch.equal(
        one["model.layers.0.mlp.up_proj.D"], other["model.layers.0.mlp.up_proj.D"]
    )


@pytest.mark.parametrize("num_clients", [2, 3])
def test_one_full_batch_step_of_k_clients_is_one_central_step(federate, num_clients):
    """With SGD, weights by answer tokens and equal C, averaging the folded factors is exact.

    A and D move linearly in their gradients; with B = 0 so does K = I + E + C B, by g + C C^T g.
    The clients' mean gradients, weighted by their tokens, add up to the gradient of the union.
    """
    batches = {"per_device_train_batch_size": 24, "lora_dropout": 0.0, **FULL_BATCH_SGD}
    central = federate("central", num_clients=1, **batches)
    parted = federate("parted", num_clients=num_clients, **batches)
    moved = 0.0
    for name in central:
        torch.testing.assert_close(parted[name], central[name], rtol=1e-5, atol=1e-7)
        moved += float(central[name].abs().sum()) if name.endswith(".D") else 0.0
    assert moved > 0


def test_a_second_full_batch_step_is_exact_too(federate):
    """From a trained adapter, where all factors have gradients and K is no longer the first one."""
    steps = {"lora_dropout": 0.0, **FULL_BATCH_SGD, "num_rounds": 3}
    central = federate("central", num_clients=1, per_device_train_batch_size=24, **steps)
    parted = federate("parted", partition="by-column:site", per_device_train_batch_size=24, **steps)
    for name in central:
        torch.testing.assert_close(parted[name], central[name], rtol=1e-4, atol=1e-6)
    first = federate("first", num_clients=1, per_device_train_batch_size=24, **FULL_BATCH_SGD)
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.E"], central["model.layers.0.mlp.up_proj.E"]
    )


def test_learning_rate_zero_changes_nothing(federate):
    fresh = federate("fresh", learning_rate=0.0, num_clients=2, num_rounds=1)
    later = federate("later", learning_rate=0.0, num_clients=2, num_rounds=3)
    assert_equal_to_the_bit(fresh, later)


def test_identical_sites_learn_what_one_learns(federate, tiny_dir, rows_file):
    """Two sites with the same rows, one full-batch step each, are one site."""
    from fedfora.data.clinic import clinic_rows

    rows = clinic_rows()[:6]
    twice = rows_file([dict(row, site=s) for s in "ab" for row in rows], "twice.json")
    once = rows_file([dict(row, site="a") for row in rows], "once.json")
    batches = {"per_device_train_batch_size": 6, "lora_dropout": 0.0, **FULL_BATCH_SGD}
    one = federate("one", train_file=once, partition="by-column:site", **batches)
    two = federate("two", train_file=twice, partition="by-column:site", **batches)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-8)
