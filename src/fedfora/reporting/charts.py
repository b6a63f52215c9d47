"""Points to SVG: curves over rounds, and scores with their intervals.

The SVG takes its colors from the page (`var(--c0)`, `var(--ink)`, ...), so that it follows light,
dark and print. Every mark carries its value as a title, which a browser shows on hovering.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fedfora.reporting.series import Points
from fedfora.reporting.wording import number

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34
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
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(curves: Mapping[str, Points], *, name: str, axis: str) -> str:
    """Return curves over rounds or steps as one SVG element.

    Args:
        curves: Curve to its points, at most `NUM_COLORS`; see `as_band` for more.
        name: The measurement, which tells the unit; see `fedfora.reporting.wording`.
        axis: What x counts.
    """
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    if not points:
        return ""
    x = _x_axis([place for place, _ in points])
    y = _y_axis([value for _, value in points], binary="bytes" in name)
    marks = [_grid(x, y, name, axis)]
    for index, (label, curve) in enumerate(curves.items()):
        marks.append(_curve(label, [p for p in curve if math.isfinite(p[1])], index, x, y, name))
    return _svg(WIDTH, HEIGHT, f"{name} over {axis}s: {', '.join(curves)}", "".join(marks))


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


def interval_chart(rows: Sequence[tuple[str, float, Sequence[float] | None]], *, name: str) -> str:
    """Return scores between 0 and 1 as dots, with their intervals where there are any.

    Args:
        rows: Label, score, and the interval's bounds or None.
        name: The score.
    """
    row_height, left = 26, 168
    height = TOP + row_height * len(rows) + BOTTOM
    x = Axis(0, 1, left, WIDTH - RIGHT - 8, (0, 0.25, 0.5, 0.75, 1))
    bottom = height - BOTTOM
    marks = [
        f'<line class="grid" x1="{x(t)}" y1="{TOP}" x2="{x(t)}" y2="{bottom}"/>'
        f'<text x="{x(t)}" y="{bottom + 18}" text-anchor="middle">{t:g}</text>'
        for t in x.ticks
    ]
    for index, (label, score, bounds) in enumerate(rows):
        y = TOP + row_height * (index + 0.5)
        shown = f"{label}: {number(name, score)}"
        marks.append(
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(_short(label))}</text>'
        )
        if bounds:
            low, high = bounds
            shown += f" ({number(name, low)} to {number(name, high)})"
            marks.append(f'<line class="whisker" x1="{x(low)}" y1="{y}" x2="{x(high)}" y2="{y}"/>')
        marks.append(
            f'<circle class="dot" cx="{x(score)}" cy="{y}" r="5">'
            f"<title>{escape(shown)}</title></circle>"
        )
    return _svg(WIDTH, height, f"{name} of each way of training", "".join(marks))


def _curve(label: str, points: Points, index: int, x: Axis, y: Axis, name: str) -> str:
    dash = DASHES[index % len(DASHES)]
    kind = "curve whole" if label == ALL_SITES else "curve"
    path = " ".join(f"{x(place)},{y(value)}" for place, value in points)
    line = (
        f'<polyline class="{kind}" points="{path}" style="stroke:var(--c{index % NUM_COLORS})"'
        f' stroke-dasharray="{dash}"/>'
    )
    dots = "".join(
        f'<circle cx="{x(place)}" cy="{y(value)}" r="{2.5 if len(points) < 60 else 1.2}"'
        f' style="fill:var(--c{index % NUM_COLORS})">'
        f"<title>{escape(label)}, {place:g}: {number(name, value)}</title></circle>"
        for place, value in points
    )
    return line + dots


def _grid(x: Axis, y: Axis, name: str, axis: str) -> str:
    lines = [
        f'<line class="grid" x1="{LEFT}" y1="{y(t)}" x2="{WIDTH - RIGHT}" y2="{y(t)}"/>'
        f'<text x="{LEFT - 8}" y="{y(t) + 4}" text-anchor="end">{_tick(name, t)}</text>'
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


def _x_axis(places: Sequence[float]) -> Axis:
    low, high = min(places), max(places)
    if low == high:
        low, high = low - 1, high + 1
    step = max(1, _nice_step(high - low, 6))
    first = math.ceil(low / step) * step
    ticks = tuple(first + i * step for i in range(int((high - first) / step) + 1))
    return Axis(low, high, LEFT + 6, WIDTH - RIGHT - 6, ticks)


def _y_axis(values: Sequence[float], *, binary: bool) -> Axis:
    low, high = min(values), max(values)
    start, end = HEIGHT - BOTTOM, TOP
    if low > 1e-300 and high / low > LOG_RATIO:  # below that, powers of ten are zero
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = tuple(10.0**k for k in decades)
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
        return Axis(10.0 ** decades[0], 10.0 ** decades[-1], start, end, ticks, log=True)
    if 0 <= low < 0.5 * high:
        low = 0.0
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):  # as good as one value
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
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


def _short(text: str, longest: int = 24) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _svg(width: int, height: int, title: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{content}</svg>"
    )
