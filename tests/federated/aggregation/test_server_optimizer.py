"""Server optimizers against the papers' formulas by hand, and the laws they share."""

import pytest
import torch

from fedfora.federated.aggregation.server_optimizer import NAMES, ServerOptimizer


def update(*values):
    return {"q.A": torch.tensor([values])}


def test_sgd_at_rate_one_is_the_aggregate_to_the_bit():
    current, aggregate = update(1.0, 2.0), update(1.1, 0.3)
    optimizer = ServerOptimizer("sgd", learning_rate=1.0)
    assert torch.equal(optimizer.step(current, aggregate)["q.A"], aggregate["q.A"])
    half = ServerOptimizer("sgd", learning_rate=0.5).step(current, aggregate)["q.A"]
    torch.testing.assert_close(half, torch.tensor([[1.05, 1.15]]))


def test_momentum_by_hand():
    """m_1 = 1, m_2 = 0.5 * 1 + 1: positions 0, 1, 2.5."""
    optimizer = ServerOptimizer("momentum", momentum=0.5)
    x = update(0.0)
    for expected in (1.0, 2.5):
        x = optimizer.step(x, {"q.A": x["q.A"] + 1})
        assert x["q.A"].item() == pytest.approx(expected)


def test_adams_steps_by_hand():
    # tau^2 = 0.01 to begin with, Delta = 2 and then 1, beta_2 = 0.9
    v_1, v_2 = 0.9 * 0.01 + 0.1 * 4, 0.9 * 0.409 + 0.1 * 1
    numbers = {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.9, "tau": 0.1}
    optimizer, x = ServerOptimizer("adam", **numbers), update(0.0)
    x = optimizer.step(x, {"q.A": x["q.A"] + 2})
    first = 0.1 * 1.0 / (v_1**0.5 + 0.1)  # m_1 = 0.5 * 2
    assert x["q.A"].item() == pytest.approx(first)
    x = optimizer.step(x, {"q.A": x["q.A"] + 1})
    second = 0.1 * 1.0 / (v_2**0.5 + 0.1)  # m_2 = 0.5 * 1 + 0.5 * 1
    assert x["q.A"].item() == pytest.approx(first + second, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_change_is_no_step(name):
    optimizer, x = ServerOptimizer(name, learning_rate=0.3), update(1.0, -2.0)
    torch.testing.assert_close(optimizer.step(x, x)["q.A"], x["q.A"])


@pytest.mark.parametrize("name", NAMES)
def test_moments_taken_up_elsewhere_go_on_to_the_bit(name):
    whole = ServerOptimizer(name, learning_rate=0.3)
    x = update(1.0, -2.0)
    targets = [update(2.0, 0.0), update(0.0, 1.0), update(3.0, 3.0)]
    for target in targets[:2]:
        x = whole.step(x, target)
    moments = {k: v.clone() for k, v in whole.moments.items()}
    resumed = ServerOptimizer(name, learning_rate=0.3, moments=moments)
    one, two = whole.step(x, targets[2]), resumed.step(x, targets[2])
    assert torch.equal(one["q.A"], two["q.A"])
