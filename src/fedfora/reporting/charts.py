"""Points to SVG: curves over rounds or steps.

The SVG takes its colors from the page (`var(--c0)`, `var(--ink)`, ...), so that it follows light,
dark and print. Every mark carries its value as a title, which a browser shows on hovering.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fedfora.metrics import METRICS
from fedfora.reporting.history import Points
from fedfora.reporting.wording import number

WIDTH, HEIGHT = 460, 240
RIGHT, TOP, BOTTOM = 12, 12, 34
NUM_COLORS = 8  # as many as the page defines; more curves than that become a band
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # told apart without color, too
ALL_SITES = "all sites"  # the curve of the whole run, drawn thicker among those of the sites
LOG_RATIO = 30  # a loss that falls this far is drawn on a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """Values to pixels, and the values that get a tick."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        scale = math.log10 if self.log else float
        low, high, value = map(scale, (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(
    curves: Mapping[str, Points],
    *,
    name: str,
    axis: str,
    colors: Mapping[str, int] | None = None,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Return curves over rounds or steps as one SVG element.

    Args:
        curves: Curve to its points, at most `NUM_COLORS`; see `as_band` for more.
        name: The measurement, which tells the unit; see `fedfora.reporting.wording`.
        axis: What x counts.
        colors: Curve to its place among the page's colors; in the order of the curves without it.
        levels: What to compare with, drawn as level lines: its name to its value.
    """
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    if not points:
        return ""
    levels = levels or {}
    values = [value for _, value in points] + [*levels.values()]
    is_score = name.rsplit(".", 1)[-1].removeprefix("own_") in METRICS
    y = _y_axis(values, binary="bytes" in name, may_be_log=not is_score)
    left = 18 + 7.3 * max(len(_tick(name, tick)) for tick in y.ticks)
    x = _x_axis([place for place, _ in points], left)
    marks = [_grid(x, y, name, axis, left), _levels(levels, y, name, left)]
    for index, (label, curve) in enumerate(curves.items()):
        drawn = [p for p in curve if math.isfinite(p[1])]
        marks.append(_curve(label, drawn, (colors or {}).get(label, index), x, y, name))
    title = escape(f"{name} over {axis}s: {', '.join(curves)}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{''.join(marks)}</svg>"
    )


def as_band(sites: Mapping[str, Points]) -> dict[str, Points]:
    """Return the curves to draw: of every site or, of many, the lowest, median and highest."""
    if len(sites) <= NUM_COLORS:
        return dict(sites)
    by_place: dict[float, list[float]] = {}
    for curve in sites.values():
        for place, value in curve:
            by_place.setdefault(place, []).append(value)
    ordered = {place: sorted(values) for place, values in sorted(by_place.items())}
    return {
        f"lowest of {len(sites)} sites": [(x, v[0]) for x, v in ordered.items()],
        "median": [(x, v[(len(v) - 1) // 2]) for x, v in ordered.items()],
        "highest": [(x, v[-1]) for x, v in ordered.items()],
    }


def _levels(levels: Mapping[str, float], y: Axis, name: str, left: float) -> str:
    """Draw level lines; a label that would overlap another's moves to its right."""
    marks: list[str] = []
    taken: dict[float, float] = {}
    for label, value in levels.items():
        height, words = y(value), f"{label}: {number(name, value)}"
        above = height - 4 if height > TOP + 12 else height + 13
        near = [width for at, width in taken.items() if abs(at - above) < 13]
        taken[above] = sum(near) + 7 * len(words) + 10
        marks.append(
            f'<line class="level" x1="{left}" y1="{height}" x2="{WIDTH - RIGHT}" y2="{height}"/>'
            f'<text class="level" x="{left + 4 + sum(near)}" y="{above}">{escape(words)}</text>'
        )
    return "".join(marks)


def _curve(label: str, points: Points, index: int, x: Axis, y: Axis, name: str) -> str:
    color, dash = color_and_dash(label, index)
    path = " ".join(f"{x(place)},{y(value)}" for place, value in points)
    line = (
        f'<polyline class="curve{" whole" if label == ALL_SITES else ""}" points="{path}"'
        f' style="stroke:{color}" stroke-dasharray="{dash}"/>'
    )
    dots = "".join(
        f'<circle cx="{x(place)}" cy="{y(value)}" r="{2.5 if len(points) < 60 else 1.2}"'
        f' style="fill:{color}">'
        f"<title>{escape(label)}, {place:g}: {number(name, value)}</title></circle>"
        for place, value in points
    )
    return line + dots


def color_and_dash(label: str, index: int) -> tuple[str, str]:
    """Return how a curve is drawn that has this place among the colors."""
    if label == ALL_SITES:
        return "var(--ink)", ""
    return f"var(--c{index % NUM_COLORS})", DASHES[index % len(DASHES)]


def _grid(x: Axis, y: Axis, name: str, axis: str, left: float) -> str:
    lines = [
        f'<line class="grid" x1="{left}" y1="{y(t)}" x2="{WIDTH - RIGHT}" y2="{y(t)}"/>'
        f'<text x="{left - 8}" y="{y(t) + 4}" text-anchor="end">{_tick(name, t)}</text>'
        for t in y.ticks
    ]
    lines += [
        f'<text x="{x(t)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:g}</text>'
        for t in x.ticks
    ]
    lines.append(
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{axis}</text>'
    )
    return "".join(lines)


def _x_axis(places: Sequence[float], left: float) -> Axis:
    low, high = min(places), max(places)
    if low == high:
        low, high = low - 1, high + 1
    step = max(1, _nice_step(high - low, 6))
    first = math.ceil(low / step) * step
    ticks = tuple(first + i * step for i in range(int((high - first) / step) + 1))
    return Axis(low, high, left + 6, WIDTH - RIGHT - 6, ticks)


def _y_axis(values: Sequence[float], *, binary: bool, may_be_log: bool) -> Axis:
    low, high = min(values), max(values)
    start, end = HEIGHT - BOTTOM, TOP
    if may_be_log and low > 1e-300 and high / low > LOG_RATIO:  # below that, powers of ten are zero
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = tuple(10.0**k for k in decades)
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
        return Axis(10.0 ** decades[0], 10.0 ** decades[-1], start, end, ticks, log=True)
    if 0 <= low < 0.5 * high:
        low = 0.0
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):  # as good as one value
        pad = abs(high) * 0.1 + 1e-9
        low, high = (low - pad, high + pad) if high else (0.0, 1.0)
    unit = 1024.0 ** math.floor(math.log(high, 1024)) if binary and high >= 1 else 1.0
    step = unit * _nice_step((high - low) / unit, 5)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    ticks = tuple(low + i * step for i in range(round((high - low) / step) + 1))
    return Axis(low, high, start, end, ticks)


def _nice_step(span: float, most: int) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that cuts `span` into at most `most`."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= most + 1e-9)


def _tick(name: str, value: float) -> str:
    if "bytes" in name or name.endswith("seconds"):
        return number(name, value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
