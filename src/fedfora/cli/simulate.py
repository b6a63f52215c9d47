"""fedfora simulate: a whole federation on this machine.

    fedfora simulate --model_name_or_path MODEL --train_file rows.json --test_file test.json
        --partition iid --num_clients 4 --num_rounds 10 --output_dir out/federation

It writes an adapter, as `fedfora train` does. --compare base alone central shows what each site
gains. --resume DIRECTORY resumes a stopped run.
"""

from collections.abc import Sequence
from typing import Any

from fedfora.cli.console import announce, silence_libraries
from fedfora.federated.preflight import preflight, resolve_settings, work_of
from fedfora.federated.settings import FederationSettings, settings_parser
from fedfora.registry import counted
from fedfora.reporting.card import Card, card_of
from fedfora.reporting.history import read_run

SENT = "uplink_bytes_per_round_and_site"  # on a run's card


def run(argv: Sequence[str]) -> None:
    """Parse, simulate, and say where the results are."""
    parser = settings_parser(__doc__)
    settings = resolve_settings(parser.values(argv), parser)
    silence_libraries()
    announce(_plan(settings, preflight(settings)))
    from fedfora.federated.comparison import compare
    from fedfora.federated.coordinator.checkpoint import next_steps, resume_hint
    from fedfora.reporting.view import View

    try:
        with View(work_of(settings)) as view:
            compare(settings, view)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(resume_hint(settings.run.output_dir)) from stop
    if settings.federation.compare:
        print_comparison(settings.run.output_dir, f"All test rows of {settings.data.test_file}")
    for line in next_steps(settings.run.output_dir):
        print(line)


def _plan(settings: FederationSettings, rows: dict[str, int]) -> str:
    """Return two or three lines on who will train what, on how many rows."""
    shown = [f"{name} ({count:,})" for name, count in list(rows.items())[:8]]
    more = " ..." if len(rows) > 8 else ""
    model, federation, step = settings.model, settings.federation, settings.train.rows_per_step
    lines = [
        f"{counted(len(rows), 'site')} (rows): {', '.join(shown)}{more}",
        f"{counted(federation.num_rounds, 'round')} of {settings.aggregation.aggregation} for "
        f"{model.model_name_or_path} ({model.quantization})",
    ]
    if small := [f"{name} ({count})" for name, count in rows.items() if count < step]:
        lines.append(
            f"fewer rows than the {step} of one step: {', '.join(small[:8])} (--min_rows_per_site "
            "merges small sites)"
        )
    return "\n".join(lines)


def table_of_arms(card: Card) -> list[tuple[str, dict[str, float], int, float]]:
    """Return name, scores, peak memory and seconds of each arm; of sites alone, mean and worst."""
    from fedfora.reporting.sections import arms

    table = []
    for arm in arms(card)[1]:
        mean = "alone_mean" if arm["kind"] == "alone" else arm["kind"]
        worst = [("alone_worst", arm["worst"])] if arm["kind"] == "alone" else []
        for name, row in [(mean, arm), *worst]:
            table.append((name, row["scores"], row["peak_memory_bytes"], row["wall_seconds"]))
    return table


def print_comparison(output_dir: str, title: str) -> None:
    """Print each arm's scores on all test rows, and what each site gains on its own kind."""
    from rich.console import Console

    from fedfora.reporting.sections import arms, own_kinds
    from fedfora.reporting.view import clock
    from fedfora.reporting.wording import label, number, tabled_scores

    run = read_run(output_dir)
    card = card_of(run)
    headline, found = arms(card)
    names = tabled_scores(found[-1]["worst"]["scores"])
    table = _table(title)
    sent, memory_title = "uplink per\nround and\nsite, KiB", "peak\nMiB"
    headings = [label(name).replace("parse rate", "parse\nrate") for name in names]
    for column in (*headings, sent, memory_title, "time"):  # headings wrap, numbers never
        table.add_column(column, justify="right")
    for name, scores, memory, seconds in table_of_arms(card):
        table.add_row(
            name.replace("_", ", "),
            *(number(key, scores[key]) for key in names),
            f"{card['federation'][SENT] / 1024:.0f}" if name == "federated" else "-",
            f"{memory / 2**20:,.0f}",
            clock(seconds),
            style="bold" if name == "federated" else "",
        )
    console = Console(soft_wrap=True, markup=False)
    console.print()
    console.print(table)
    if not (sites := own_kinds(run, card)):
        return
    known = next(iter(sites.values()))
    own_arms = [arm for arm in ("base", "alone", "federated", "central") if arm in known]
    table = _table(f"{label(headline)} of each site on its own kind of test rows")
    for column in (*own_arms, *(["gain over alone"] if "alone" in own_arms else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for site, own in sites.items():
        gain = [f"{own['federated'] - own['alone']:+.3f}"] if "alone" in own else []
        table.add_row(site, *(number(headline, own[arm]) for arm in own_arms), *gain)
    console.print(table)


def _table(title: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    return table
