"""The report's tables and sentences: a run and its card to words and rows of text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedfora.metrics import headlines, in_order
from fedfora.reporting.card import Card, card_of
from fedfora.reporting.history import Run
from fedfora.reporting.record import Event
from fedfora.reporting.series import sites_of
from fedfora.reporting.wording import (
    data_size,
    duration,
    is_score,
    label,
    number,
    tabled_scores,
)

Table = dict[str, Any]  # "columns": names, "rows": lists of text

EXAMPLES, MOST_SCORES = 12, 12
HIDDEN = "-"  # what secure aggregation or record privacy keeps from the coordinator
# What happened to sites and rounds; what else is recorded stands elsewhere on the page.
_INCIDENTS = ("rejected", "absent", "joined", "lost", "waiting", "resumed", "stopped_early")


def summary(run: Run, card: Card) -> str:
    """Return what was run, in a sentence."""
    base, adapter = card["base"], card["adapter"]
    parts = []
    if "federation" in card:
        federation = card["federation"]
        sites, settings = len(federation["sites"]), federation["settings"]
        parts.append(f"A federation of {sites} site{'' if sites == 1 else 's'}")
        parts.append(f"{federation['rounds']} of {settings['num_rounds']} rounds")
        parts += [f"{settings['local_steps']} steps a round"] if "local_steps" in settings else []
        parts += [f"rule {settings['aggregation']}"] if "aggregation" in settings else []
        parts += ["secure aggregation"] if run.setting("secure", "secure_aggregation") else []
    elif run.of("trained") or run.of("step"):
        parts.append("Training of one adapter")
    elif run.scores:
        parts.append(f"Predictions for {run.scores.get('rows', len(run.predictions))} rows")
    if "lora_rank" in adapter:
        parts.append(f"FoRA rank {adapter['lora_rank']}")
    if base["name"]:
        held = f" in {base['quantization']}" if base["quantization"] not in (None, "none") else ""
        parts.append(f"base {base['name']}{held}")
    parts += [f"data {card['data']['train_file']}"] if card["data"]["train_file"] else []
    return ", ".join(parts) + "." if parts else "A run."


def facts(run: Run, card: Card) -> list[tuple[str, str]]:
    """Return the few numbers that are asked for first, each with its name."""
    rows = _headline(card)
    losses = [
        line["loss"]
        for line in run.events
        if line.get("event") in ("round", "step") and isinstance(line.get("loss"), int | float)
    ]
    if losses:
        rows.append(("training loss, last", f"{losses[-1]:.3f}"))
    if federation := card.get("federation"):
        rows.append(("sent by all sites", data_size(federation["uplink_bytes"])))
        each = federation["uplink_bytes_per_round_and_site"]
        rows += [("per round and site", data_size(each))] if each else []
    memory = [row["peak_memory_bytes"] for row in card["rows"] if "peak_memory_bytes" in row]
    memory += [line["peak_memory_bytes"] for line in run.events if "peak_memory_bytes" in line]
    rows += [("peak memory", data_size(max(memory)))] if memory else []
    rows += [("time", duration(card["seconds"]))] if card["seconds"] is not None else []
    epsilon = card["privacy"]["epsilon"]
    if "federation" in card:
        rows.append(("epsilon", "none" if epsilon is None else f"{epsilon:.3g}"))
    return rows


def score_names(card: Card) -> list[str]:
    """Return the usual scores that any row of the card has; the first few where none is usual."""
    usual = {name for row in card["rows"] for name in tabled_scores(row["scores"])}
    names = _all_scores(card)
    return [name for name in names if name in usual] or names[:MOST_SCORES]


def other_scores(card: Card) -> list[tuple[str, list[str]]]:
    """Return the scores that the card's table leaves out: each with its value in every row."""
    shown = score_names(card)
    return [
        (label(name), [_cell(name, row["scores"].get(name)) for row in card["rows"]])
        for name in _all_scores(card)
        if name not in shown
    ]


def _all_scores(card: Card) -> list[str]:
    scores = [item for row in card["rows"] for item in row["scores"].items()]
    return in_order({name: None for name, value in scores if is_score(value) and name != "rows"})


def _cell(name: str, value: float | None) -> str:
    return "" if value is None else number(name, value)


def score_rows(card: Card) -> list[Table]:
    """Return the card's rows as text: name, kind, scores with intervals, memory, time."""
    rows = []
    for row in card["rows"]:
        bounds = row["scores"].get("intervals", {})
        cells = []
        for name in score_names(card):
            value, interval = row["scores"].get(name), bounds.get(name)
            around = f"{interval[0]:.3f} to {interval[1]:.3f}" if _finite(interval) else ""
            cells.append((_cell(name, value), around))
        memory, seconds = row.get("peak_memory_bytes"), row.get("wall_seconds")
        rows.append(
            {
                "name": row["name"],
                "kind": row["kind"],
                "scores": cells,
                "memory": "" if memory is None else data_size(memory),
                "time": "" if seconds is None else duration(seconds),
            }
        )
    return rows


def relations(card: Card) -> Table | None:
    """Return the trained adapter's scores for each relation; None where none are told apart."""
    keys = ("precision", "recall", "f1", "folded_f1", "lenient_f1")
    rows = [
        [name, str(of["expected"]), *(number(key, of[key]) if key in of else "" for key in keys)]
        for row in card["rows"]
        if row["kind"] in ("federated", "scored")
        for name, of in row["scores"].get("relations", {}).items()
    ]
    columns = ["relation", "expected", *(label(key) for key in keys)]
    return {"columns": columns, "rows": rows} if rows else None


def contributions(run: Run) -> Table | None:
    """Return what each site gave over all rounds; None where no sites are recorded."""
    by_site: dict[str, list[dict[str, Any]]] = {}
    for line in run.of("round"):
        for site in sites_of(line):
            by_site.setdefault(str(site["site"]), []).append(site)
    if not by_site:
        return None
    tokens = sum(site.get("answer_tokens", 0) for rounds in by_site.values() for site in rounds)
    rows = []
    for name, rounds in by_site.items():
        own = int(_sum(rounds, "answer_tokens"))
        rows.append(
            [
                name,
                str(len(rounds)),
                f"{rounds[-1]['rows']:,}" if "rows" in rounds[-1] else HIDDEN,
                f"{own:,}" if own else HIDDEN,
                f"{own / tokens:.1%}" if tokens else HIDDEN,
                f"{rounds[-1]['loss']:.3f}" if "loss" in rounds[-1] else HIDDEN,
                data_size(_sum(rounds, "uplink_bytes")),
                duration(seconds) if (seconds := _sum(rounds, "seconds")) else HIDDEN,
            ]
        )
    columns = ["site", "rounds", "rows", "answer tokens", "share", "last loss", "sent", "time"]
    return {"columns": columns, "rows": rows, "hides": any(HIDDEN in row for row in rows)}


def _sum(lines: Iterable[Mapping[str, Any]], name: str) -> float:
    return float(sum(line.get(name, 0) for line in lines))


def incidents(run: Run) -> Table | None:
    """Return what was rejected or otherwise noted, with the reasons; None where nothing was.

    These are the lists of objects in a round's line beside the sites, e.g. its rejections, and the
    events of sites and rounds that are out of the ordinary.
    """
    rows = []
    for line in run.of("round"):
        for name, entries in line.items():
            if name == "sites" or not isinstance(entries, list):
                continue
            rows += [
                [f"round {line['round']}", label(name), _described(entry)] for entry in entries
            ]
    for line in run.events:
        if line.get("event") in _INCIDENTS:
            details = {
                k: v for k, v in line.items() if k not in ("event", "seconds", "time", "round")
            }
            where = f"round {line['round']}" if "round" in line else _clock(line)
            rows.append([where, label(str(line.get("event"))), _described(details)])
    # A rejection is logged when it happens and again in its round's line.
    rows = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    return {"columns": ["when", "what", "details"], "rows": rows} if rows else None


def examples(predictions: Sequence[dict[str, Any]]) -> Table | None:
    """Return some answered rows, line by line: the wrong ones first, as they teach more.

    A line is "found" where the prediction holds it, "missed" where it does not, "wrong" where only
    the prediction holds it. A choice is right or wrong as it was scored. Free text is neither: its
    rows bear their ROUGE-L.
    """
    answered = [_compared(row) for row in predictions if row.get("prediction") is not None]
    if not answered:
        return None
    judged = [row for row in answered if row["wrong"] is not None]
    wrong = [row for row in judged if row["wrong"]]
    chosen = wrong[: EXAMPLES // 2]
    chosen += [row for row in answered if not row["wrong"]][: EXAMPLES - len(chosen)]
    return {"rows": chosen, "all": len(answered), "judged": len(judged), "wrong": len(wrong)}


def settings(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the resolved settings by section."""
    return [
        (section, [(name, _plain(value)) for name, value in values.items()])
        for section, values in run.config.items()
        if isinstance(values, Mapping)
    ]


def environment(run: Run) -> list[tuple[str, str]]:
    """Return versions, hardware, seed and fingerprints, without the command."""
    flat: list[tuple[str, str]] = []
    for name, value in run.environment.items():
        if name == "command" or value in (None, [], {}):
            continue
        if isinstance(value, Mapping):
            flat += [(str(key), _plain(item)) for key, item in value.items()]
        else:
            flat.append((label(name), _plain(value)))
    return flat


def overview(names: Sequence[str], runs: Sequence[Run]) -> Table:
    """Return the runs side by side: what they came to, and the settings in which they differ."""
    cards = [card_of(run) for run in runs]
    rows: list[list[str]] = []
    facts_of_runs = [dict(facts(run, card)) for run, card in zip(runs, cards, strict=True)]
    for name in dict.fromkeys(key for column in facts_of_runs for key in column):
        rows.append([name, *(column.get(name, "") for column in facts_of_runs)])
    columns = [
        {f"{section}.{name}": value for section, values in settings(run) for name, value in values}
        for run in runs
    ]
    for name in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(name, "") for column in columns]
        count = sum(name in column for column in columns)
        if count > 1 and len(set(values)) > 1 and name != "run.output_dir":
            rows.append([label(name), *values])
    return {"columns": ["", *names], "rows": rows}


def _headline(card: Card) -> list[tuple[str, str]]:
    """Return the main scores of the trained adapter."""
    rows = [row for row in card["rows"] if row["kind"] in ("federated", "scored")][:1]
    return [
        (
            label(name) + (f" {row['name']}" if row["kind"] == "federated" else ""),
            number(name, row["scores"][name]),
        )
        for row in rows
        for name in headlines(row["scores"])
    ]


def _compared(row: dict[str, Any]) -> dict[str, Any]:
    scores = row.get("scores", {})
    predicted = _lines(row["prediction"])
    expected = _lines(row["reference"]) if row.get("reference") is not None else []
    marked = row.get("reference") is not None and "token_f1" not in scores  # text is neither
    right = scores.get("f1", scores.get("correct"))  # as the row was scored, where it was
    missed, surplus = set(expected) - set(predicted), set(predicted) - set(expected)
    if right == 1 or not marked:
        missed, surplus = set(), set()
    elif "correct" in scores:
        missed, surplus = set(expected), set(predicted)
    found = "found" if marked else ""
    return {
        "instruction": row.get("instruction") or "",
        "input": row.get("input") or "",
        "expected": [("missed" if line in missed else found, line) for line in expected],
        "predicted": [("wrong" if line in surplus else found, line) for line in predicted],
        "wrong": bool(missed or surplus) if marked else None,
        "score": f"ROUGE-L {scores['rougeL']:.3f}" if "rougeL" in scores else "",
    }


def _lines(text: str) -> list[str]:
    return [line.strip() for line in str(text).strip().split("\n") if line.strip()]


def _described(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return ", ".join(f"{label(str(k))}: {_plain(v)}" for k, v in entry.items())
    return _plain(entry)


def _plain(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_plain, value))
    return str(value)


def _finite(interval: Sequence[float | None] | None) -> bool:
    return interval is not None and None not in interval


def _clock(line: Event) -> str:
    return duration(line["seconds"]) if "seconds" in line else ""
