"""The report's tables and sentences: a run and its card to words and rows of text."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedfora.metrics import headlines, in_order
from fedfora.metrics.triples import parse_triples
from fedfora.registry import counted
from fedfora.reporting.card import Card, card_of
from fedfora.reporting.history import Run, sites_of
from fedfora.reporting.view import Board
from fedfora.reporting.wording import (
    data_size,
    describe,
    duration,
    is_score,
    label,
    number,
    tabled_scores,
)

Table = dict[str, Any]  # "columns": names, "rows": lists of text

ROUNDS_SHOWN, SITES_SHOWN, CHOICES_SHOWN, MOST_SCORES = 40, 40, 24, 12
HIDDEN = "-"  # what secure aggregation or record privacy keeps from the coordinator
# What happened to sites and rounds; what else is recorded stands elsewhere on the page.
_TOLD = ("loss", "uplink_bytes", "seconds")  # of a site in a round
_LATE = ("no answer within", "unreachable")
_STATES = {"left out": "out", "absent": "late"}
_INCIDENTS = ("rejected", "absent", "joined", "lost", "waiting", "resumed", "stopped_early")


def summary(run: Run, card: Card) -> str:
    """Return what was run, in a sentence."""
    base, adapter = card["base"], card["adapter"]
    parts = []
    if "federation" in card:
        federation = card["federation"]
        sites, settings = len(federation["sites"]), federation["settings"]
        parts.append(f"A federation of {counted(sites, 'site')}")
        parts.append(f"{federation['rounds']} of {counted(settings['num_rounds'], 'round')}")
        if "local_steps" in settings:
            parts.append(f"{counted(settings['local_steps'], 'step')} a round")
        parts += [f"rule {settings['aggregation']}"] if "aggregation" in settings else []
        parts += ["secure aggregation"] if run.setting("secure", "secure_aggregation") else []
    elif run.of("trained") or run.of("step"):
        parts.append("Training of one adapter")
    elif run.scores:
        rows = run.scores.get("rows", len(run.predictions))
        parts.append(f"Predictions for {counted(rows, 'row')}")
    if "lora_rank" in adapter:
        parts.append(f"FoRA rank {adapter['lora_rank']}")
    if base["name"]:
        held = f" in {base['quantization']}" if base["quantization"] not in (None, "none") else ""
        parts.append(f"base {base['name']}{held}")
    parts += [f"data {card['data']['train_file']}"] if card["data"]["train_file"] else []
    return ", ".join(parts) + "." if parts else "A run."


def facts(run: Run, card: Card) -> list[tuple[str, str]]:
    """Return the few numbers that are asked for first, each with its name."""
    rows = []
    for row in [row for row in card["rows"] if row["kind"] in ("federated", "scored")][:1]:
        of = f" {row['name']}" if row["kind"] == "federated" else ""
        for name in headlines(row["scores"]):
            rows.append((label(name) + of, number(name, row["scores"][name])))
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
    if (epsilon := card["privacy"]["epsilon"]) is not None:
        rows.append(("epsilon", f"{epsilon:.3g}"))
    return rows


def score_table(card: Card) -> Table:
    """Return the card's rows as text: the usual scores with intervals, memory, time; the others.

    Where no score is usual, the first few are shown.
    """
    scores = [item for row in card["rows"] for item in row["scores"].items()]
    known = in_order({name: None for name, value in scores if is_score(value) and name != "rows"})
    usual = {name for row in card["rows"] for name in tabled_scores(row["scores"])}
    names = [name for name in known if name in usual] or known[:MOST_SCORES]

    def cell(row: Mapping[str, Any], name: str) -> str:
        value = row["scores"].get(name)
        return "" if value is None else number(name, value)

    def around(row: Mapping[str, Any], name: str) -> str:
        interval = row["scores"].get("intervals", {}).get(name)
        return f"{interval[0]:.3f} to {interval[1]:.3f}" if _finite(interval) else ""

    rows = [
        {
            "name": row["name"],
            "kind": row["kind"],
            "scores": [(cell(row, name), around(row, name)) for name in names],
            "memory": data_size(size) if (size := row.get("peak_memory_bytes")) else "",
            "time": duration(seconds) if (seconds := row.get("wall_seconds")) else "",
        }
        for row in card["rows"]
    ]
    others = [
        (label(name), [cell(row, name) for row in card["rows"]])
        for name in known
        if name not in names
    ]
    return {"names": names, "rows": rows, "others": others}


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
    for name in filter(by_site.get, site_names(run)):
        rounds = by_site[name]
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


def log(run: Run) -> list[tuple[str, str, bool]]:
    """Return what has happened, the latest first: when, what, and whether it is unusual.

    A round's line may hold such things too, as lists of objects beside its sites.
    """
    total = run.setting("federation", "num_rounds")
    rows: dict[str, tuple[str, str, bool]] = {}
    for line in run.events:
        when = duration(line["seconds"]) if "seconds" in line else ""  # since the run began
        if "time" in line:
            when = time.strftime("%H:%M:%S", time.localtime(line["time"]))
        told = [(describe(line, total), line.get("event") in _INCIDENTS)]
        for name, entries in line.items() if line.get("event") == "round" else ():
            for entry in entries if isinstance(entries, list) and name != "sites" else ():
                usual = name == "rejected" and {"site", "reason"} <= set(entry)
                again = {"event": "rejected", "round": line["round"], **entry} if usual else {}
                other = f"round {line['round']}: {label(name)}: {_described(entry)}"
                told.append((describe(again, total) if usual else other, True))
        for text, odd in told:  # a rejection comes when it happens and again with its round
            rows |= {text: (when, text, odd)} if text and text not in rows else {}
    return list(reversed(rows.values()))


def answers(predictions: Sequence[dict[str, Any]], *, most: int) -> Table | None:
    """Return answered rows, line by line: the wrong ones first, as they teach more.

    A line is "found" where the prediction holds it, "missed" where it does not, "wrong" where only
    the prediction holds it. A choice is right or wrong as it was scored. Free text is neither: its
    rows bear their ROUGE-L.

    Args:
        predictions: The rows of predictions.jsonl.
        most: How many to return; half of them right ones, where there are as many.
    """
    answered = [compared(row) for row in predictions if row.get("prediction") is not None]
    if not answered:
        return None
    judged = [row for row in answered if row["wrong"] is not None]
    wrong = [row for row in judged if row["wrong"]]
    chosen = wrong[: max(most // 2, most - len(answered) + len(wrong))]
    chosen += [row for row in answered if not row["wrong"]][: most - len(chosen)]
    groups = {
        title: list(dict.fromkeys(g for row in chosen for g in row[title]))[:CHOICES_SHOWN]
        for title in ("site", "relation")
    }
    filters = {title: names for title, names in groups.items() if len(names) > 1}
    for row in chosen:
        row["marks"] = [
            f"{title}-{names.index(name)}"
            for title, names in filters.items()
            for name in row[title]
            if name in names
        ] + ["is-wrong"] * bool(row["wrong"])
    return {"rows": chosen, "judged": len(judged), "wrong": len(wrong), "filters": filters}


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


def overview(names: Sequence[str], runs: Sequence[Run]) -> tuple[Table, Table]:
    """Return the runs' results side by side, and the settings in which they differ."""
    cards = [card_of(run) for run in runs]
    facts_of_runs = [dict(facts(run, card)) for run, card in zip(runs, cards, strict=True)]
    results = [
        [name, *(column.get(name, "") for column in facts_of_runs)]
        for name in dict.fromkeys(key for column in facts_of_runs for key in column)
    ]
    columns = [
        {f"{section}.{name}": value for section, values in settings(run) for name, value in values}
        for run in runs
    ]
    differences = []
    for name in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(name, "") for column in columns]
        count = sum(name in column for column in columns)
        if count > 1 and len(set(values)) > 1 and not name.endswith("output_dir"):
            differences.append([label(name), *values])
    head = ["", *names]
    return {"columns": head, "rows": results}, {"columns": head, "rows": differences}


def arms(card: Card) -> tuple[str, list[dict[str, Any]]]:
    """Return the score that judges, and the result of each way of training.

    Its `value` is in the middle of `around`: the 95 % interval or, for sites alone, whose mean it
    is, the worst and the best of them. `scores` are means too; `worst` is the row of the worst.
    """
    rows = card["rows"]
    last = [row["scores"] for row in rows if row["kind"] in ("federated", "scored")][-1:]
    name = next((name for scores in last for name in headlines(scores)), "")
    found: list[dict[str, Any]] = []
    for kind in ("base", "alone", "federated", "scored", "central"):
        of_kind = [row for row in rows if row["kind"] == kind and name in row["scores"]]
        if not of_kind:
            continue
        worst, title = min(of_kind, key=lambda row: row["scores"][name]), kind
        around = worst["scores"].get("intervals", {}).get(name)
        if len(of_kind) > 1:
            best = max(row["scores"][name] for row in of_kind)
            around, title = [worst["scores"][name], best], f"{kind}, mean of {len(of_kind)}"
        scores = {
            key: sum(row["scores"][key] for row in of_kind) / len(of_kind)
            for key, value in worst["scores"].items()
            if is_score(value)
        }
        found.append(
            {
                "kind": kind,
                "title": title,
                "value": scores[name],
                "around": around if _finite(around) else None,
                "scores": scores,
                "worst": worst,
                "peak_memory_bytes": max(row.get("peak_memory_bytes", 0) for row in of_kind),
                "wall_seconds": sum(row.get("wall_seconds", 0) for row in of_kind) / len(of_kind),
            }
        )
    return name, found


def own_kinds(run: Run, card: Card) -> dict[str, dict[str, float]]:
    """Return for each site the judging score of each way of training on its own kind of rows."""
    name, _ = arms(card)
    rounds = [line["groups"] for line in run.of("round") if line.get("groups")]
    rows = [("federated", "", groups) for groups in rounds[-1:]]
    rows += [(row["kind"], row["name"], row.get("groups", {})) for row in card["rows"]]
    sites: dict[str, dict[str, float]] = {site: {} for site in site_names(run)}
    for kind, title, groups in rows:
        for site, scores in groups.items():
            if name in scores and (kind != "alone" or title == f"{site}, alone"):
                sites.setdefault(site, {})[kind] = scores[name]
    return {site: own for site, own in sites.items() if "federated" in own}


def site_names(run: Run) -> list[str]:
    """Return all sites, by name and number: site-2 comes before site-10."""
    names = {str(site["site"]) for line in run.of("round") for site in sites_of(line)}
    names |= {str(line["site"]) for line in run.events if "site" in line}

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", name)]

    return sorted(names, key=key)


def timeline(run: Run, board: Board | None) -> Table | None:
    """Return what became of each site in each round: "in", "out", "late", or a step of this one."""
    cells: dict[str, dict[int, tuple[str, str]]] = {name: {} for name in site_names(run)}
    notes: dict[str, str] = {}
    for line in run.events:
        kind, place = line.get("event"), line.get("round", 0)
        for site in sites_of(line) if kind == "round" else ():
            words = [f"{label(key)} {number(key, site[key])}" for key in _TOLD if key in site]
            cells[str(site["site"])][place] = ("in", ", ".join(["in", *words]))
            notes.pop(str(site["site"]), None)
        for entry in line.get("rejected", ()) if kind == "round" else [line]:
            if kind in ("round", "rejected", "absent") and {"site", "reason"} <= set(entry):
                name, reason = str(entry["site"]), str(entry["reason"])
                late = kind == "absent" or reason.startswith(_LATE)
                notes[name] = f"{'late or absent' if late else 'left out'}: {reason}"
                if place:
                    cells.setdefault(name, {})[place] = ("late" if late else "out", notes[name])
    rounds = {line["round"] for line in run.of("round")}
    if board is not None and board.drawn_round and board.drawn_round not in rounds:
        rounds.add(board.drawn_round)
        for name, row in board.sites.items():
            state = _STATES.get(row.state, row.state.removeprefix("step "))
            if row.state != "rests":
                cells.setdefault(name, {}).setdefault(board.drawn_round, (state, row.state))
    if not rounds:
        return None
    shown, names = sorted(rounds)[-ROUNDS_SHOWN:], list(cells)
    if len(names) > SITES_SHOWN:  # those with trouble first
        names.sort(key=lambda name: sum(kind == "in" for kind, _ in cells[name].values()))
    rows = [
        (name, [cells[name].get(number, ("", "not asked")) for number in shown], notes.get(name))
        for name in names[:SITES_SHOWN]
    ]
    return {"rounds": shown, "rows": rows, "more": len(names) - len(rows), "all": len(rounds)}


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """Return an answered row, a row of predictions.jsonl, line by line; see `answers`."""
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
    triples = parse_triples("\n".join(expected))[0] if "options" not in row else []
    named = expected if row.get("options") else [relation for _, relation, _ in triples]
    return {
        "instruction": row.get("instruction") or "",
        "input": row.get("input") or "",
        "expected": [("missed" if line in missed else found, line) for line in expected],
        "predicted": [("wrong" if line in surplus else found, line) for line in predicted],
        "others": {name: _lines(said) for name, said in row.get("others", {}).items()},
        "wrong": bool(missed or surplus) if marked else None,
        "score": f"ROUGE-L {scores['rougeL']:.3f}" if "rougeL" in scores else "",
        "site": [str(row["site"])] if "site" in row else [],
        "relation": list(dict.fromkeys(named)),
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
