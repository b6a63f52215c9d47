"""Runs to one HTML page that needs nothing but itself: no network, no scripts.

The page shows what the record holds and leaves out what it does not. `fedfora watch --web` shows
the same page, redrawn while the record grows.
"""

import csv
import io
import json
import shlex
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedfora.metrics import METRICS
from fedfora.registry import counted
from fedfora.reporting import sections
from fedfora.reporting.card import FILE as CARD
from fedfora.reporting.card import Card, card_of
from fedfora.reporting.charts import ALL_SITES, NUM_COLORS, as_band, color_and_dash, line_chart
from fedfora.reporting.history import Curves, Run, curves_of, is_constant, read_run
from fedfora.reporting.model_card import model_card
from fedfora.reporting.record import RunRecord, peak_memory_bytes, write_json, write_text
from fedfora.reporting.view import Board
from fedfora.reporting.wording import label, number

FILE = "report.html"

# Drawn first, in this order; what else was measured follows by name, folded.
_JUDGES = tuple(f"scores.{name}" for name in METRICS if METRICS[name].headline == 0)
FIRST = (*_JUDGES, "loss", "validation_loss", "received_validation_loss", "epsilon")
_OURS = ("federated", "scored")  # the rest is what a federation is compared with
ANSWERS, LIVE_ANSWERS, LINES = 24, 300, 200  # shown at most: on a page to send, while one watches


@dataclass(frozen=True)
class Chart:
    """A drawn measurement: its title, its SVG, the legend's entries and the numbers behind it."""

    title: str
    svg: Markup
    legend: list[tuple[tuple[str, str], str]]  # a curve's color and dashes, and its name
    table: list[tuple[str, list[tuple[str, str]]]]


@dataclass(frozen=True)
class Live:
    """What a page shows of runs that one watches.

    Args:
        state: Where the run stands, in words; empty for several runs.
        board: The round that is on.
        index: Name, address and state of the runs beside it.
        script: What keeps the page up to date.
    """

    state: str
    board: Board | None
    index: list[tuple[str, str, str]]
    script: str


def write_report(
    directories: Sequence[str | Path], path: str | Path, *, no_examples: bool = False
) -> None:
    """Write the page of some runs; it appears whole or not at all.

    The answered rows, which hold people's texts, can be left out.

    Raises:
        ValueError: If a directory holds no run, or a broken one.
    """
    runs = [read_run(directory) for directory in directories]
    if no_examples:
        runs = [replace(run, predictions=[]) for run in runs]
    write_text(Path(path), report(runs))


def report(runs: Sequence[Run], live: Live | None = None) -> str:
    """Return the page of some runs, which are compared where there are several.

    Without runs it lists those that can be watched.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.directory) for run in runs]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def date(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

    environment.filters |= {"label": label, "quoted": shlex.quote, "date": date, "counted": counted}
    environment.globals |= {"number": number}
    source = files("fedfora.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    style = files("fedfora.reporting").joinpath("report.css").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=(" and ".join(names) if len(names) < 4 else f"{len(names)} runs") or "Runs",
        style=Markup(style),  # our own file
        live=live,
        script=Markup(live.script) if live else "",
        runs=[_page(name, run, live) for name, run in zip(names, runs, strict=True)],
        overview=sections.overview(names, runs) if len(runs) > 1 else None,
        shared_charts=_shared_charts(names, runs) if len(runs) > 1 else [],
        choices=range(sections.CHOICES_SHOWN),
    )


def _page(name: str, run: Run, live: Live | None) -> dict[str, Any]:
    card = card_of(run)
    curves = curves_of(run.events)
    score, arms = sections.arms(card)
    log = sections.log(run)
    colors = {site: place for place, site in enumerate(sections.site_names(run))}
    levels = {arm["title"]: arm["value"] for arm in arms if arm["kind"] not in _OURS}
    measured = {
        name: [point for points in curves.of[name].values() for point in points]
        for name in sorted(curves.of, key=_rank)
    }
    charts = [
        (name, _chart(curves, name, colors, levels if name == f"scores.{score}" else {}))
        for name, points in measured.items()
        if not is_constant(points)
    ]
    # The same in every round and at every site; zeros are what was not measured.
    same = {name: points[0][1] for name, points in measured.items() if is_constant(points)}
    budget = run.setting("privacy", "target_epsilon")
    return {
        "name": name,
        "card": card,
        "began": min((line["time"] for line in run.events if "time" in line), default=None),
        "directory": str(run.directory),
        "holds_adapter": (run.directory / "adapter_config.json").is_file(),
        "is_over": bool(run.of("finished")),
        "summary": sections.summary(run, card),
        "facts": sections.facts(run, card),
        "score": label(score),
        "arms": arms,
        "own": sections.own_kinds(run, card),
        "timeline": sections.timeline(run, live.board if live else None),
        "colors": {site: place % NUM_COLORS for site, place in colors.items()},
        "budget": budget if isinstance(budget, int | float) else None,
        "scores": (scores := sections.score_table(card)),
        "has_bounds": any(around for row in scores["rows"] for _, around in row["scores"]),
        "has_cost": any(row["memory"] or row["time"] for row in scores["rows"]),
        "relations": sections.relations(card),
        "charts": [chart for name, chart in charts if _is_first(name)],
        "more_charts": [chart for name, chart in charts if not _is_first(name)],
        "steady": [(label(name), number(name, value)) for name, value in same.items() if value],
        "contributions": sections.contributions(run),
        "incidents": [row for row in log if row[2]],
        "log": log[:LINES],
        "answers": sections.answers(run.predictions, most=LIVE_ANSWERS if live else ANSWERS),
        "downloads": _downloads(curves, card),
        "settings": sections.settings(run),
        "environment": sections.environment(run),
    }


def _downloads(curves: Curves, card: Card) -> list[tuple[str, str]]:
    """Return files that the page carries: a name, and the content as an address."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([curves.axis, "site", "measurement", "value"])
    for name in sorted(curves.of):
        for site, points in curves.of[name].items():
            writer.writerows([f"{place:g}", site, name, value] for place, value in points)
    content = {
        "metrics.csv": ("text/csv", table.getvalue()),
        "card.json": ("application/json", json.dumps(card, indent=2, ensure_ascii=False)),
    }
    return [
        (name, f"data:{kind};base64,{b64encode(text.encode(errors='backslashreplace')).decode()}")
        for name, (kind, text) in content.items()
    ]


def _chart(
    curves: Curves, name: str, colors: Mapping[str, int], levels: Mapping[str, float]
) -> Chart:
    """Draw a measurement: the sites' own curves where there are any, and the whole run's."""
    measured = curves.of[name]
    sites = sorted(filter(None, measured), key=lambda site: colors.get(site, 0))
    drawn = as_band({site: measured[site] for site in sites}) or measured
    if "" in measured and sites:
        drawn = {ALL_SITES: measured[""], **dict(list(drawn.items())[: NUM_COLORS - 1])}
    colors = colors if set(drawn) & set(colors) else {}
    return _drawn_chart(drawn, name, curves.axis, colors, levels)


def _drawn_chart(
    drawn: dict[str, Any],
    name: str,
    axis: str,
    colors: Mapping[str, int] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Chart:
    places = sorted({place for points in drawn.values() for place, _ in points})
    values = {entry: dict(points) for entry, points in drawn.items()}
    svg = line_chart(drawn, name=name, axis=axis, colors=colors, levels=levels)
    return Chart(
        title=label(name) + (" on held-out rows" if name.startswith("scores.") else ""),
        svg=Markup(svg),  # escapes its words
        legend=[
            (color_and_dash(entry, (colors or {}).get(entry, index)), entry)
            for index, (entry, points) in enumerate(drawn.items())
            if entry and points
        ],
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
        some = {
            name: {measure: points[""] for measure, points in curves.of.items() if "" in points}
            for name, curves in by_run.items()
            if curves.axis == axis
        }
        for measure in sorted({m for whole in some.values() for m in whole}, key=_rank):
            # A run without the measure keeps its place, so that each run has one color throughout.
            curves = {name: whole.get(measure, []) for name, whole in some.items()}
            nonempty = [points for points in curves.values() if points]
            if len(nonempty) > 1 and not all(is_constant(points) for points in nonempty):
                charts.append(_drawn_chart(as_band(curves), measure, axis))
    return charts


def _rank(name: str) -> tuple[int, str]:
    return FIRST.index(name) if name in FIRST else len(FIRST), name


def _is_first(name: str) -> bool:
    return name in FIRST or name.startswith("own_")


def finish_run(record: RunRecord) -> None:
    """Record the end of a run with its peak memory, and write its results."""
    record.log("finished", peak_memory_bytes=peak_memory_bytes(), wall_seconds=record.seconds())
    write_results(record.directory)


def write_results(directory: Path) -> None:
    """Write card.json, report.html and, where there is an adapter, its README.md.

    All three are made from the record, so they can be made again at any time.
    """
    run = read_run(directory)
    card = card_of(run)
    write_json(directory / CARD, card)
    adapter_config = directory / "adapter_config.json"
    if adapter_config.is_file():
        config = json.loads(adapter_config.read_text(encoding="utf-8"))
        write_text(directory / "README.md", model_card(config, card))
    write_text(directory / FILE, report([run]))
