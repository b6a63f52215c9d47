"""Curves stay on the paper, keep their order, and are well-formed SVG whatever the numbers."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedfora.reporting.charts import (
    HEIGHT,
    NUM_COLORS,
    WIDTH,
    as_band,
    line_chart,
)

VALUES = st.floats(-1e9, 1e9) | st.floats(1e-9, 1e9) | st.just(float("nan"))
CURVE = st.lists(st.tuples(st.integers(0, 500), VALUES), min_size=1, max_size=20)


@example({"0": [(0, 0.0), (0, 5e-324)]})
@example({"0": [(0, 1.0), (0, 5e-324)]})
@given(st.dictionaries(st.text(min_size=1, max_size=8), CURVE, min_size=1, max_size=8))
def test_every_point_lies_on_the_paper(curves):
    svg = line_chart(curves, name="loss", axis="round")
    if not svg:
        return
    for circle in ElementTree.fromstring(_printable(svg)).iter("circle"):
        assert 0 <= float(circle.get("cx")) <= WIDTH
        assert 0 <= float(circle.get("cy")) <= HEIGHT


@given(st.lists(st.floats(0.001, 1e6), min_size=2, max_size=30), st.sampled_from(["loss", "bytes"]))
def test_a_larger_value_is_drawn_higher(values, name):
    points = list(enumerate(values))
    drawn = ElementTree.fromstring(line_chart({"a": points}, name=name, axis="step"))
    heights = [-float(circle.get("cy")) for circle in drawn.iter("circle")]
    for one, other, low, high in zip(values, values[1:], heights, heights[1:], strict=False):
        assert (high - low) * (other - one) >= 0


def test_a_title_on_each_point_tells_its_value():
    svg = line_chart({"<north>": [(1, 0.25), (2, 0.5)]}, name="f1", axis="round")
    titles = [title.text for title in ElementTree.fromstring(svg).iter("title")]
    assert titles == ["<north>, 1: 0.250", "<north>, 2: 0.500"]


@pytest.mark.parametrize(("name", "bottom"), [("loss", "0.01"), ("scores.rougeL", "0")])
def test_a_loss_may_have_a_logarithmic_axis_and_a_score_never(name, bottom):
    svg = line_chart({"a": [(1, 0.02), (2, 1.0)]}, name=name, axis="round")
    first = next(ElementTree.fromstring(svg).iter("text"))
    assert first.text == bottom


def test_many_sites_become_a_band_of_their_lowest_median_and_highest():
    sites = {f"site {i}": [(1, float(i)), (2, float(10 * i))] for i in range(NUM_COLORS + 3)}
    band = as_band(sites)
    assert list(band.values()) == [
        [(1, 0.0), (2, 0.0)],
        [(1, 5.0), (2, 50.0)],
        [(1, 10.0), (2, 100.0)],
    ]
    few = dict(list(sites.items())[:NUM_COLORS])
    assert as_band(few) == few


@given(st.dictionaries(st.text("ab, 9", max_size=30), st.floats(0, 1), min_size=1, max_size=4))
def test_what_a_curve_is_compared_with_lies_at_its_value(levels):
    curve = {"F1": [(1, 0.0), (2, 1.0)]}
    drawn = ElementTree.fromstring(line_chart(curve, name="scores", axis="round", levels=levels))
    zero, one = (float(circle.get("cy")) for circle in drawn.iter("circle"))
    lines = [line for line in drawn.iter("line") if line.get("class") == "level"]
    for line, value in zip(lines, levels.values(), strict=True):
        assert float(line.get("y1")) == pytest.approx(zero + value * (one - zero), abs=0.1)
    words = [text for text in drawn.iter("text") if text.get("class") == "level"]
    at = [(float(text.get("x")), float(text.get("y"))) for text in words]
    assert len(set(at)) == len(at)  # none hides another


@given(st.lists(st.floats(0, 1e15), min_size=1, max_size=9))
def test_no_tick_is_cut_off(values):
    """A digit is at most 7.3 wide in the page's font of 12.5."""
    drawn = line_chart({"a": list(enumerate(values))}, name="uplink_bytes", axis="round")
    for text in ElementTree.fromstring(drawn).iter("text"):
        if text.get("text-anchor") == "end" and text.get("class") is None:
            assert float(text.get("x")) >= 7.3 * len(text.text)


def test_a_site_has_its_color_whatever_else_is_drawn():
    colors = {"north": 0, "south": 1}
    for curves in (["all sites", "south"], ["south"], ["north", "south"]):
        drawn = line_chart(
            {name: [(1, 1.0), (2, 2.0)] for name in curves}, name="loss", axis="r", colors=colors
        )
        lines = list(ElementTree.fromstring(drawn).iter("polyline"))
        assert lines[curves.index("south")].get("style") == "stroke:var(--c1)"


def _printable(svg):
    """Without the characters that XML cannot hold and HTML can."""
    return "".join(c for c in svg if c in "\t\n\r" or (c >= " " and not 0xD800 <= ord(c) <= 0xFFFF))
