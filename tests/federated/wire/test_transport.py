"""Adapters survive the journey to the bit; anything else is refused."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedfora.federated.wire.transport import Layout, pack, payload_bytes, unpack

KEY = "numbers"
UPDATE = {"q.A": torch.randn(2, 5), "q.D": torch.randn(4, 2), "q.E": torch.randn(2, 2)}


def test_there_and_back_is_bitwise_equal():
    layout = Layout.of(UPDATE)
    back = unpack(pack(UPDATE, layout), layout)
    assert back.keys() == UPDATE.keys()
    assert all(torch.equal(back[name], UPDATE[name]) for name in UPDATE)


def test_the_order_of_names_does_not_matter():
    backwards = dict(reversed(UPDATE.items()))
    layout = Layout.of(UPDATE)
    assert Layout.of(backwards) == layout
    assert pack(backwards, layout)[KEY].data == pack(UPDATE, layout)[KEY].data


def test_one_array_travels_and_its_bytes_are_the_numbers():
    record = pack(UPDATE, Layout.of(UPDATE))
    assert list(record) == [KEY]
    assert 4 * 22 <= payload_bytes(record) <= 4 * 22 + 200  # numpy's header


def test_layouts_survive_json_and_differ_by_digest():
    layout = Layout.of(UPDATE)
    assert Layout.from_json(layout.to_json()) == layout
    other = Layout.of({**UPDATE, "q.E": torch.zeros(1, 4)})
    assert other.size == layout.size
    assert other.digest != layout.digest


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            ArrayRecord({"other": Array(np.zeros(22, np.float32))}),
            "expected 22 float32 numbers, got nothing",
        ),
        (ArrayRecord({KEY: Array(np.zeros(21, np.float32))}), "expected 22 float32"),
        (ArrayRecord({KEY: Array(np.zeros((22, 1), np.float32))}), "expected 22 float32"),
        (ArrayRecord({KEY: Array(np.zeros(22, np.float64))}), "expected 22 float32"),
        (ArrayRecord({KEY: Array(np.full(22, np.nan, np.float32))}), "not finite"),
        (ArrayRecord({KEY: Array(np.full(22, np.inf, np.float32))}), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        unpack(record, Layout.of(UPDATE))
