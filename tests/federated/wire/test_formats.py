"""Travel formats: error bounds, error feedback, bytes, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedfora.federated.wire.formats import FORMATS, GROUP
from fedfora.federated.wire.transport import (
    Layout,
    pack_with_feedback,
    payload_bytes,
    unflatten,
    unpack_from,
)

ROWS = arrays(np.float32, st.integers(0, 400), elements=st.floats(-1e4, 1e4, width=32))
LOSSY = [name for name in FORMATS if name != "float32"]


def there_and_back(form, row):
    return form.decode(form.encode(row), len(row))


def bound(form, row):
    """The largest error of each number: half a step of its format."""
    if form.levels:
        groups = np.pad(row, (0, -len(row) % GROUP)).reshape(-1, GROUP)
        steps = np.abs(groups).max(axis=1, initial=0) / form.levels
        return np.repeat(steps, GROUP)[: len(row)] * 0.5001
    share = {"float32": 0.0, "float16": 2.0**-11}[form.name]
    return np.abs(row) * share + (6e-8 if form.name == "float16" else 1e-37)


@pytest.mark.parametrize("name", list(FORMATS))
@settings(deadline=None, max_examples=60)
@given(row=ROWS)
def test_there_and_back_errs_by_half_a_step_at_most(name, row):
    form = FORMATS[name]
    back = there_and_back(form, row)
    assert back.dtype == np.float32
    assert (np.abs(back - row) <= bound(form, row) + 1e-30).all()


@settings(deadline=None, max_examples=60)
@given(row=ROWS)
def test_float32_is_exact(row):
    assert np.array_equal(there_and_back(FORMATS["float32"], row), row)


@pytest.mark.parametrize("name", LOSSY)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), rounds=st.integers(1, 12))
def test_with_feedback_nothing_is_lost_in_the_long_run(name, seed, rounds):
    """What arrived, added up, is what was meant, added up, but for the last round's rest."""
    g = torch.Generator().manual_seed(seed)
    zero = {"q.A": torch.zeros(3, 50)}
    layout, lost = Layout.of(zero), None
    meant, arrived = torch.zeros(3, 50), torch.zeros(3, 50)
    for _ in range(rounds):
        update = {"q.A": torch.randn(3, 50, generator=g)}
        record, lost = pack_with_feedback(update, zero, lost, layout, FORMATS[name])
        arrived += unpack_from(record, zero, layout, FORMATS[name])["q.A"]
        meant += update["q.A"]
    rest = unflatten(lost, layout)["q.A"]
    torch.testing.assert_close(arrived + rest, meant, rtol=1e-4, atol=1e-4)
    assert rest.abs().max() < 0.6  # half a step of int4 with the largest of numbers around 4


@pytest.mark.parametrize(
    ("name", "share"),
    [("float32", 1.0), ("float16", 0.5), ("int8", 0.27), ("int4", 0.14)],
)
def test_bytes_are_a_share_of_those_of_float32(name, share):
    update = {"q.A": torch.randn(64, 1000)}
    zero = {"q.A": torch.zeros(64, 1000)}
    record, _ = pack_with_feedback(update, zero, None, Layout.of(update), FORMATS[name])
    assert payload_bytes(record) <= share * 4 * 64_000 + 300  # numpy's headers


def test_an_adapter_that_did_not_move_arrives_to_the_bit():
    start = {"q.A": torch.randn(5, 77)}
    layout = Layout.of(start)
    for form in FORMATS.values():
        record, _ = pack_with_feedback(start, start, None, layout, form)
        assert torch.equal(unpack_from(record, start, layout, form)["q.A"], start["q.A"])


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_does_not_fit_is_refused(name):
    form, row = FORMATS[name], np.ones(200, np.float32)
    good = form.encode(row)
    with pytest.raises(ValueError, match="expected"):
        form.decode(good, 201)
    with pytest.raises(ValueError, match="expected"):
        form.decode({**good, "more": row}, 200)
    with pytest.raises(ValueError, match="expected"):
        form.decode({**good, "numbers": good["numbers"][:, None]}, 200)
    with pytest.raises(ValueError, match="got nothing"):
        form.decode({}, 200)
    with pytest.raises(ValueError, match="expected"):
        form.decode({**good, "numbers": good["numbers"].astype(np.float64)}, 200)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_scale_that_is_no_number_is_refused(name):
    form = FORMATS[name]
    broken = form.encode(np.ones(200, np.float32))
    broken["scales"][0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        form.decode(broken, 200)
