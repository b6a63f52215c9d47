"""Runs to one HTML page that needs nothing but itself: no network, no scripts.

The page shows what the record holds and leaves out what it does not.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedfora.metrics import METRICS, headlines, in_order
from fedfora.reporting import sections
from fedfora.reporting.card import FILE as CARD
from fedfora.reporting.card import Card, card_of
from fedfora.reporting.charts import ALL_SITES, NUM_COLORS, as_band, interval_chart, line_chart
from fedfora.reporting.history import Run, read_run
from fedfora.reporting.model_card import model_card
from fedfora.reporting.record import RunRecord, peak_memory_bytes, write_json, write_text
from fedfora.reporting.series import Curves, Points, curves_of, is_constant
from fedfora.reporting.wording import label, number

FILE = "report.html"

# Drawn first, in this order; what else was measured follows by name, and how much was read and how
# long it took comes last.
FIRST = ("loss", "validation_loss", "scores", "aggregation_error", "epsilon")
LAST = ("answer_tokens", "tokens", "seconds")


@dataclass(frozen=True)
class Chart:
    """A drawn measurement: its title, its SVG, the legend's entries and the numbers behind it."""

    title: str
    svg: Markup
    legend: list[tuple[int, str]]  # which of the curves' colors and dashes, and its name
    table: list[tuple[str, list[tuple[str, str]]]]


def write_report(
    directories: Sequence[str | Path], path: str | Path, *, no_examples: bool = False
) -> None:
    """Write the page of some runs; it appears whole or not at all.

    Args:
        directories: Of the runs.
        path: The page.
        no_examples: Whether to leave out the answered rows, which hold people's texts.

    Raises:
        ValueError: If a directory holds no run, or a broken one.
    """
    runs = [read_run(directory) for directory in directories]
    if no_examples:
        runs = [replace(run, predictions=[]) for run in runs]
    write_text(Path(path), report(runs))


def report(runs: Sequence[Run]) -> str:
    """Return the page of some runs, which are compared where there are several."""
    names = _distinct_names(runs)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"label": label}
    environment.globals |= {"number": number}
    source = files("fedfora.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    style = files("fedfora.reporting").joinpath("report.css").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        style=Markup(style),  # our own file
        runs=[_page(name, run) for name, run in zip(names, runs, strict=True)],
        overview=sections.overview(names, runs) if len(runs) > 1 else None,
        shared_charts=_shared_charts(names, runs) if len(runs) > 1 else [],
    )


def _page(name: str, run: Run) -> dict[str, Any]:
    """Return what the template needs of one run."""
    card = card_of(run)
    curves = curves_of(run.events)
    charts = [(name, _chart(curves, name)) for name in _order(curves) if _drawn(curves, name)]
    if shares := _shares(curves):
        charts.insert(1, ("scores", _drawn_chart(shares, "scores", curves.axis)))
    return {
        "name": name,
        "card": card,
        "summary": sections.summary(run, card),
        "facts": sections.facts(run, card),
        "score_names": sections.score_names(card),
        "scores": (scores := sections.score_rows(card)),
        "has_bounds": any(around for row in scores for _, around in row["scores"]),
        "has_cost": any(row["memory"] or row["time"] for row in scores),
        "other_scores": sections.other_scores(card),
        "relations": sections.relations(card),
        "intervals": _intervals(card),
        "charts": [chart for name, chart in charts if name not in LAST],
        "more_charts": [chart for name, chart in charts if name in LAST],
        "steady": [(label(name), number(name, points[0][1])) for name, points in _steady(curves)],
        "contributions": sections.contributions(run),
        "incidents": sections.incidents(run),
        "examples": sections.examples(run.predictions),
        "settings": sections.settings(run),
        "environment": sections.environment(run),
    }


def _shares(curves: Curves) -> dict[str, Points]:
    """Return the scores that lie between 0 and 1: they share one chart."""
    shares = {
        name.removeprefix("scores."): points
        for name, points in curves.whole.items()
        if name.startswith("scores.") and all(0 <= value <= 1 for _, value in points)
    }
    names = in_order(shares)
    usual = [name for name in names if name in METRICS.names() and METRICS[name].tabled]
    return {label(name): shares[name] for name in usual or names}


def _chart(curves: Curves, name: str) -> Chart:
    """Draw a measurement: the sites' own curves where there are any, and the whole run's."""
    drawn = as_band(curves.sites.get(name, {}))
    if name in curves.whole and drawn:
        drawn = {ALL_SITES: curves.whole[name], **dict(list(drawn.items())[: NUM_COLORS - 1])}
    elif name in curves.whole:
        drawn = {"": curves.whole[name]}
    return _drawn_chart(drawn, name, curves.axis)


def _drawn_chart(drawn: dict[str, Any], name: str, axis: str) -> Chart:
    places = sorted({place for points in drawn.values() for place, _ in points})
    values = {entry: dict(points) for entry, points in drawn.items()}
    return Chart(
        title=label(name),
        svg=Markup(line_chart(drawn, name=name, axis=axis)),  # escapes its words
        legend=[(i, entry) for i, (entry, points) in enumerate(drawn.items()) if entry and points],
        table=[
            (
                f"{place:g}",
                [(e, number(name, v[place]) if place in v else "") for e, v in values.items() if v],
            )
            for place in places
        ],
    )


def _shared_charts(names: Sequence[str], runs: Sequence[Run]) -> list[Chart]:
    """Draw what at least two runs measured over the same axis, one curve for each run."""
    by_run = {name: curves_of(run.events) for name, run in zip(names, runs, strict=True)}
    charts = []
    for axis in ("round", "step"):
        some = {name: curves.whole for name, curves in by_run.items() if curves.axis == axis}
        for measure in _by_rank({m for whole in some.values() for m in whole}):
            # A run without the measure keeps its place, so that each run has one color throughout.
            curves = {name: whole.get(measure, []) for name, whole in some.items()}
            nonempty = [points for points in curves.values() if points]
            if len(nonempty) > 1 and not all(is_constant(points) for points in nonempty):
                charts.append(_drawn_chart(as_band(curves), measure, axis))
    return charts


def _intervals(card: Card) -> dict[str, Any] | None:
    """Draw the main score of every row, where at least two rows have it."""
    scores = [name for row in card["rows"] for name in headlines(row["scores"])]
    for name in [name for name in dict.fromkeys(scores) if name != "chrf"]:  # that ends at 100
        rows = [
            (row["name"], row["scores"][name], row["scores"].get("intervals", {}).get(name))
            for row in card["rows"]
            if name in row["scores"]
        ]
        if len(rows) > 1:
            svg = Markup(interval_chart(rows, name=label(name)))
            return {"svg": svg, "name": label(name)}
    return None


def _order(curves: Curves) -> list[str]:
    return _by_rank(set(curves.whole) | set(curves.sites))


def _by_rank(names: Iterable[str]) -> list[str]:
    rank = {name: place for place, name in enumerate(FIRST)}
    return sorted(names, key=lambda name: (rank.get(name, len(FIRST)), name))


def _drawn(curves: Curves, name: str) -> bool:
    """Say whether a measurement varies over the rounds or the sites and has a chart of its own."""
    if name.startswith("scores.") and _shares(curves):
        return False
    return not is_constant(_points(curves, name))


def _points(curves: Curves, name: str) -> Points:
    """Return all points of a measurement, of the whole run and of every site."""
    every = [curves.whole.get(name, []), *curves.sites.get(name, {}).values()]
    return [point for curve in every for point in curve]


def _steady(curves: Curves) -> list[tuple[str, Any]]:
    """Return the measurements that are the same in every round and at every site."""
    values = []
    for name in _order(curves):
        if name.startswith("scores.") and _shares(curves):
            continue
        points = _points(curves, name)
        if points and points[0][1] and is_constant(points):  # zeros are what was not measured
            values.append((name, points))
    return values


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Return the directories' names, whole paths where two are called alike."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [str(run.directory) for run in runs]


# What a run directory gets at the end: the evaluation card, the adapter's README, the report.
#
# All three are made from the record, so they can be made again at any time.


def finish_run(record: RunRecord) -> None:
    """Record the end of a run with its peak memory, and write its results."""
    record.log("finished", peak_memory_bytes=peak_memory_bytes(), wall_seconds=record.seconds())
    write_results(record.directory)


def write_results(directory: Path) -> None:
    """Write card.json, report.html and, where there is an adapter, its README.md."""
    run = read_run(directory)
    card = card_of(run)
    write_json(directory / CARD, card)
    adapter_config = directory / "adapter_config.json"
    if adapter_config.is_file():
        config = json.loads(adapter_config.read_text(encoding="utf-8"))
        write_text(directory / "README.md", model_card(config, card))
    write_text(directory / FILE, report([run]))
