"""The coordinator's arithmetic of a round, without messages and models."""

import logging

import pytest
import torch

from fedfora.federated.aggregation import RULES
from fedfora.federated.aggregation.update import absorb, part
from fedfora.federated.coordinator.aggregator import Aggregator
from fedfora.federated.settings import from_run_config
from fedfora.federated.wire.formats import FORMATS
from fedfora.federated.wire.messages import RoundMessages

SHAPES = {"q.A": (3, 9), "q.D": (7, 3), "q.E": (3, 3)}


def adapter(seed):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def dense(update):
    A, D, E = (update[f"q.{f}"].double() for f in "ADE")
    return D @ (torch.eye(len(A)).double() + E) @ A


@pytest.fixture
def round_of():
    """A function that plays a round of a rule with three sites and flags."""

    def play(name, *, aggregator=None, start=None, **flags):
        settings = from_run_config({"aggregation": name, **flags})
        aggregator = aggregator or Aggregator(settings)
        rule = RULES[name]
        before = adapter(0) if start is None else start
        exchange = RoundMessages(rule, before, FORMATS["float32"], round_index=0)
        sites = [adapter(k) for k in (1, 2, 3)]
        if rule.absorbs:
            sites = [absorb(site) for site in sites]
        pairs = [
            (part(site, rule.travels), weight)
            for site, weight in zip(sites, (1.0, 2.0, 3.0), strict=True)
        ]
        after, reading = aggregator.aggregate(exchange, pairs)
        core = {"q.E": torch.zeros(3, 3)} if rule.absorbs else {}
        mean = sum(w * dense({**before, **exchange.whole(u), **core}) for u, w in pairs) / 6
        return after, reading, mean

    return play


def test_a_large_error_names_the_better_rule_once(round_of, caplog):
    settings = from_run_config({"aggregation": "fedavg"})
    aggregator = Aggregator(settings)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _, reading, _ = round_of("fedavg", aggregator=aggregator, start=adapter(0))
    assert reading.aggregation_error > 0.1
    assert reading.attainable_error < reading.aggregation_error / 2
    assert caplog.text.count("--aggregation refactor would be") == 1
    assert f"it is {100 * reading.aggregation_error:.0f} % off" in caplog.text


def test_exact_rules_say_nothing(round_of, caplog):
    for name in ("refactor", "core", "ffa"):
        round_of(name)
    assert caplog.text == ""


def test_every_new_adapter_is_whole_and_float32(round_of):
    for name in RULES:
        after, _, _ = round_of(name)
        assert {n[-1] for n in after} == set("ADE"), name
        assert {value.dtype for value in after.values()} == {torch.float32}, name
        assert len(after["q.E"]) == len(after["q.A"]), name


def test_half_a_server_step_ends_halfway(round_of):
    start = adapter(0)
    whole, _, _ = round_of("fedavg", start=start)
    half, _, _ = round_of("fedavg", start=start, server_learning_rate=0.5)
    for name in start:
        torch.testing.assert_close(half[name], (start[name] + whole[name]) / 2)
