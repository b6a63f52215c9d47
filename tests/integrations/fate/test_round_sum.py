"""What goes into FATE's sum and comes out: exact in core mode, else with its error measured."""

import pytest
import torch

from fedfora.integrations.fate.round_sum import contribution, take_out, traveling

LAYERS = {"model.a": (12, 20), "model.b": (20, 8)}  # inputs, outputs
RANK = 3


def adapter(seed, *, like=None):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, (inputs, outputs) in LAYERS.items():
        for factor, shape in (("A", (RANK, inputs)), ("D", (outputs, RANK)), ("E", (RANK, RANK))):
            state[f"{layer}.{factor}"] = torch.randn(shape, generator=generator)
    kept = {} if like is None else {n: t for n, t in like.items() if not n.endswith(".E")}
    return state | kept


def delta(state, layer):
    A, D, E = (state[f"{layer}.{factor}"].double() for factor in "ADE")
    return D @ (torch.eye(RANK) + E) @ A


def summed(updates, shares, trainable, **options):
    """FATE's weighted mean of each array, in float64."""
    put_in = [contribution(u, trainable, loss=float(i), **options) for i, u in enumerate(updates)]
    means = [
        sum(share * array.double() for share, array in zip(shares, arrays, strict=True)).numpy()
        for arrays in zip(*put_in, strict=True)
    ]
    return take_out(means, updates[0], trainable, **options)


def dense_error(updates, shares, averaged):
    missed = norm = 0.0
    for layer in LAYERS:
        mean = sum(s * delta(u, layer) for s, u in zip(shares, updates, strict=True))
        missed += float((delta(averaged, layer) - mean).square().sum())
        norm += float(mean.square().sum())
    return (missed / norm) ** 0.5


def test_the_mean_of_cores_on_common_bases_is_the_mean_of_the_updates():
    first = adapter(0)
    updates = [first, adapter(1, like=first), adapter(2, like=first)]
    shares = [0.5, 0.3, 0.2]
    averaged, loss, error = summed(updates, shares, "core", num_probes=8, seed=1)
    assert dense_error(updates, shares, averaged) < 1e-6
    assert error is None
    assert loss == pytest.approx(0.3 * 1 + 0.2 * 2)
    assert {n.rpartition(".")[2] for n in traveling(first, "core")} == {"E"}


def test_the_measured_error_of_averaged_factors_is_the_dense_one():
    updates, shares = [adapter(0), adapter(1), adapter(2)], [0.5, 0.3, 0.2]
    averaged, _, error = summed(updates, shares, "all", num_probes=4000, seed=1)
    dense = dense_error(updates, shares, averaged)
    assert dense > 0.1
    assert error == pytest.approx(dense, rel=0.05)


def test_few_probes_are_right_on_average():
    updates, shares = [adapter(0), adapter(1)], [0.5, 0.5]
    averaged, *_ = summed(updates, shares, "all", num_probes=0, seed=0)
    errors = [summed(updates, shares, "all", num_probes=4, seed=seed)[2] for seed in range(60)]
    dense = dense_error(updates, shares, averaged)
    assert sum(errors) / len(errors) == pytest.approx(dense, rel=0.1)


def test_equal_updates_are_a_fixed_point_without_error():
    one = adapter(0)
    averaged, _, error = summed([one, one], [0.25, 0.75], "all", num_probes=4, seed=1)
    assert error == pytest.approx(0, abs=1e-6)
    for name in one:
        torch.testing.assert_close(averaged[name], one[name])


def test_without_probes_nothing_is_measured_and_less_travels():
    one = adapter(0)
    with_probes = contribution(one, "all", loss=0.0, num_probes=2, seed=1)
    without = contribution(one, "all", loss=0.0, num_probes=0, seed=1)
    assert len(with_probes) == len(without) + len(LAYERS)
    assert summed([one, adapter(1)], [0.5, 0.5], "all", num_probes=0, seed=1)[2] is None
