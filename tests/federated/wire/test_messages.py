"""Frozen factors are sent once, asked for again when lost; ranks and the round's draws agree."""

import pytest
import torch
from flwr.app import RecordDict

from fedfora.federated.aggregation import RULES
from fedfora.federated.wire.formats import FORMATS
from fedfora.federated.wire.messages import (
    FrozenFactorsMissingError,
    RoundMessages,
    read_assignment,
)
from fedfora.federated.wire.transport import Layout, digest_of, payload_bytes


@pytest.fixture
def adapter():
    g = torch.Generator().manual_seed(0)
    shapes = {"q.A": (3, 9), "q.D": (7, 3), "q.E": (3, 3)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def exchange_of(name, adapter):
    return RoundMessages(RULES[name], adapter, FORMATS["float32"], round_index=4)


def test_frozen_factors_come_once_and_are_remembered(adapter):
    exchange, state = exchange_of("core", adapter), RecordDict()
    first = exchange.message(3, has_frozen=False)
    whole = read_assignment(first, state, Layout.of(adapter))
    later = exchange.message(3, has_frozen=True)
    again = read_assignment(later, state, Layout.of(adapter))
    for got in (whole, again):
        assert all(torch.equal(got.adapter[name], adapter[name]) for name in adapter)
    once, always = (sum(map(payload_bytes, m.array_records.values())) for m in (first, later))
    assert always < 4 * 9 + 300 < once


def test_a_site_that_lost_them_says_so(adapter):
    message = exchange_of("core", adapter).message(3, has_frozen=True)
    with pytest.raises(FrozenFactorsMissingError, match="does not have the frozen factors"):
        read_assignment(message, RecordDict(), Layout.of(adapter))
    state = RecordDict()
    other = {name: value + 1 for name, value in adapter.items()}
    brought = exchange_of("core", other).message(3, has_frozen=False)
    read_assignment(brought, state, Layout.of(adapter))
    with pytest.raises(FrozenFactorsMissingError):
        read_assignment(message, state, Layout.of(adapter))


def test_a_site_of_a_lower_rank_gets_the_first_components(adapter):
    exchange = exchange_of("refactor", adapter)
    message = exchange.message(2, has_frozen=True)
    got = read_assignment(message, RecordDict(), Layout.of(adapter))
    assert torch.equal(got.adapter["q.A"], adapter["q.A"][:2])
    assert got.adapter["q.D"].shape == (7, 2)
    assert not got.adapter["q.E"].any()  # the core went into D
    core = torch.eye(3) + adapter["q.E"]
    torch.testing.assert_close(got.adapter["q.D"], (adapter["q.D"] @ core)[:, :2])


def test_a_digest_tells_names_shapes_and_numbers_apart(adapter):
    same = {name: value.clone() for name, value in reversed(adapter.items())}
    assert digest_of(same, Layout.of(same)) == digest_of(adapter, Layout.of(adapter))
    moved = {**adapter, "q.A": adapter["q.A"] + 1e-6}
    renamed = {name.replace("q", "k"): value for name, value in adapter.items()}
    updates = (adapter, moved, renamed)
    assert len({digest_of(update, Layout.of(update)) for update in updates}) == 3
