"""Passes over the rows to optimizer steps, as transformers' Trainer counts them."""

import math

import pytest

from fedfora.privacy.settings import PrivacyArguments
from fedfora.training.schedule import num_steps
from fedfora.training.settings import TrainArguments


def steps(num_rows, batch_size=1, accumulation=1, num_processes=1, **changes):
    settings = TrainArguments(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **({"num_train_epochs": 1} | changes),
    )
    return num_steps(settings, PrivacyArguments(), num_rows, num_processes)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_a_pass_sees_every_row(num_processes, accumulation):
    for num_rows in range(1, 40):
        options = {"batch_size": 4, "accumulation": accumulation, "num_processes": num_processes}
        per_step = 4 * accumulation * num_processes
        taken = steps(num_rows, **options)
        assert (taken - 1) * per_step < num_rows <= taken * per_step
        assert steps(num_rows, num_train_epochs=3, **options) == 3 * taken


def test_part_of_a_pass_and_steps_by_number():
    assert steps(17, num_train_epochs=2, batch_size=4, accumulation=2) == 6  # 5 batches, 3 steps
    assert steps(10, num_train_epochs=0.25) == math.ceil(2.5)
    assert steps(17, max_steps=7) == 7
