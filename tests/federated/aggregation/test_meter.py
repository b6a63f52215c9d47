"""The error meter, against dense matrices."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfora.federated.aggregation import RULES
from fedfora.federated.aggregation.means import ErrorMeter, ProductSum, squared_norm

FIXTURE = HealthCheck.function_scoped_fixture


def read(pairs, aggregate, before):
    meter = ErrorMeter()
    for update, weight in pairs:
        meter.add(update, weight)
    return meter.read(aggregate, before)


def dense_ratio(adapters, pairs, one, other_of):
    """||one - mean|| / ||other - mean|| over both layers, from dense matrices."""
    top = sum((adapters.dense(one, k) - adapters.mean(pairs, k)).square().sum() for k in "qv")
    bottom = sum(other_of(k).square().sum() for k in "qv")
    return float((top / bottom).sqrt())


@settings(deadline=None, max_examples=30, suppress_health_check=[FIXTURE])
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=30), seed=st.integers(0, 1000))
@pytest.mark.parametrize("factors", ["ADE", "ABCDE"])
def test_the_meter_shows_the_dense_error(adapters, factors, weights, seed):
    """For any number of sites, beyond the ranks that a matrix can have too."""
    pairs = [
        (adapters.random(seed + k, factors=factors), weight) for k, weight in enumerate(weights)
    ]
    before = adapters.random(seed + 99, factors=factors)
    aggregate = RULES["fedavg"].aggregate(before, pairs, None)
    reading = read(pairs, aggregate, before)
    error = dense_ratio(adapters, pairs, aggregate, lambda k: adapters.mean(pairs, k))
    step = dense_ratio(
        adapters,
        pairs,
        aggregate,
        lambda k: adapters.mean(pairs, k) - adapters.dense(before, k),
    )
    assert reading.aggregation_error == pytest.approx(error, rel=1e-4, abs=1e-6)
    assert reading.aggregation_error_of_step == pytest.approx(step, rel=1e-4, abs=1e-6)


def test_what_refactor_could_attain_is_what_refactor_attains(adapters):
    pairs = [(adapters.random(k), 1.0 + k) for k in range(3)]
    before = adapters.random(9)
    naive = RULES["fedavg"].aggregate(before, pairs, None)
    exact = RULES["refactor"].aggregate(before, pairs, None)
    assert read(pairs, naive, before).attainable_error == pytest.approx(
        read(pairs, exact, before).aggregation_error, rel=1e-4
    )


@pytest.mark.parametrize("name", ["core", "ffa"])
def test_exact_rules_show_no_error(adapters, name):
    rule, start = RULES[name], adapters.random(0)
    if rule.absorbs:
        start = {n: v for n, v in start.items() if not n.endswith("E")}
    frozen = {n: v for n, v in start.items() if n[-1] in rule.frozen}
    chosen = [adapters.random(k).items() for k in range(4)]
    sent = [{n: v for n, v in items if n[-1] in rule.travels} for items in chosen]
    current = {n: v for n, v in start.items() if n[-1] in rule.travels}
    aggregate = rule.aggregate(current, [(update, 1.0) for update in sent], None)
    pairs = [({**frozen, **update}, 1.0) for update in sent]
    assert read(pairs, {**frozen, **aggregate}, start).aggregation_error < 1e-6


def test_a_federation_that_does_nothing_has_no_error(adapters):
    nothing = {name: torch.zeros_like(value) for name, value in adapters.random(0).items()}
    reading = read([(nothing, 1.0)], nothing, nothing)
    assert (
        reading.aggregation_error,
        reading.aggregation_error_of_step,
        reading.attainable_error,
    ) == (0, 0, 0)


def test_a_sum_of_many_products_stays_small_and_exact():
    total, dense = ProductSum(), torch.zeros(7, 9).double()
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        P = torch.randn(7, 3, generator=g).double()
        Q = torch.randn(3, 9, generator=g).double()
        total.add((P, Q), 0.5)
        dense += 0.5 * P @ Q
    P, Q = total.factors()
    assert len(Q) <= 2 * 7 + 3
    torch.testing.assert_close(P @ Q, dense)
    assert squared_norm((P, Q)) == pytest.approx(float(dense.square().sum()))
