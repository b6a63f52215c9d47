"""Random adapters, and what they do as dense matrices."""

import pytest
import torch

I, O, R, M = 9, 7, 3, 4
LAYERS = ("q", "v")


def random_update(seed, rank=R, factors="ADE"):
    g = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, I), "B": (M, rank), "C": (rank, M), "D": (O, rank), "E": (rank, rank)}
    return {
        f"{layer}.{factor}": torch.randn(shapes[factor], generator=g)
        for layer in LAYERS
        for factor in factors
    }


def dense(update, layer="q"):
    """D (I + E + C B) A in float64, without any function of the package."""
    A, D = (update[f"{layer}.{f}"].double() for f in "AD")
    core = torch.eye(len(A)).double()
    if f"{layer}.E" in update:
        core = core + update[f"{layer}.E"].double()
    if f"{layer}.B" in update:
        core = core + update[f"{layer}.C"].double() @ update[f"{layer}.B"].double()
    return D @ core @ A


def dense_mean(pairs, layer="q"):
    return sum(w * dense(u, layer) for u, w in pairs) / sum(w for _, w in pairs)


def assert_same_function(one, other, **tolerance):
    for layer in LAYERS:
        torch.testing.assert_close(dense(one, layer), dense(other, layer), **tolerance)


@pytest.fixture
def adapters():
    """The functions above, for test modules."""
    from types import SimpleNamespace

    return SimpleNamespace(
        random=random_update, dense=dense, mean=dense_mean, assert_same=assert_same_function
    )
