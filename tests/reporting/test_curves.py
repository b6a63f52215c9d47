"""Whatever number a round's line holds becomes a curve, without this module knowing its name."""

from hypothesis import given
from hypothesis import strategies as st

from fedfora.reporting.history import curves_of, is_constant

NAMES = st.text("abcdefgh_", min_size=1, max_size=12).filter(
    lambda name: name not in ("event", "round", "step", "seconds", "time", "sites", "rows")
)
NUMBERS = st.integers(-1000, 1000) | st.floats(-1e6, 1e6)


@given(st.dictionaries(NAMES, NUMBERS, max_size=5), st.integers(1, 4))
def test_every_number_of_the_rounds_is_a_curve_and_nothing_else(measured, num_rounds):
    events = [
        {"event": "round", "round": n, "seconds": 1.0, "note": "x", "done": True, **measured}
        for n in range(1, num_rounds + 1)
    ]
    curves = curves_of(events)
    assert curves.of == {
        name: {"": [(n, value) for n in range(1, num_rounds + 1)]}
        for name, value in measured.items()
    }


@given(st.dictionaries(NAMES, NUMBERS, min_size=1, max_size=3))
def test_numbers_of_a_site_and_of_a_group_are_found_one_level_down(measured):
    site = {"site": "north", **measured}
    curves = curves_of([{"event": "round", "round": 1, "sites": [site], "privacy": measured}])
    sites = {name: {"north": [(1, v)]} for name, v in measured.items()}
    assert curves.of == sites | {f"privacy.{n}": {"": [(1, v)]} for n, v in measured.items()}


def test_a_training_has_steps_and_a_federation_rounds():
    step = {"event": "step", "step": 5, "loss": 2.0}
    assert curves_of([step]).axis == "step"
    both = curves_of([step, {"event": "round", "round": 1, "loss": 3.0}])
    assert both.axis == "round"
    assert both.of == {"loss": {"": [(1, 3.0)]}}


def test_what_does_not_move_is_constant():
    assert is_constant([(1, 5), (2, 5)])
    assert is_constant([])
    assert not is_constant([(1, 5), (2, 6)])
