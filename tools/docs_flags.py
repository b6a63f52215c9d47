"""A hook of mkdocs: puts the tables of options, read from the dataclasses, into a page."""

from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

MARK = "<!-- flags -->"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace the mark, where a page has it."""
    return markdown.replace(MARK, tables()) if MARK in markdown else markdown


def tables() -> str:
    """Return one table for each group of options, with the commands that take it."""
    commands, without = sections_of_commands(), options_without_effect()
    groups: dict[Any, list[str]] = {}
    for command, sections in commands.items():
        for section in sections:
            groups.setdefault(section, []).append(command)
    return "\n".join(_table(section, users, without) for section, users in groups.items())


def options_without_effect() -> dict[str, Iterable[str]]:
    """Return the options that a command does not offer although its groups hold them."""
    from fedfora.cli.check import NO_EFFECT as CHECK_PRIVACY
    from fedfora.evaluation.settings import NO_EFFECT as PREDICT
    from fedfora.federated.settings import NO_EFFECT as SIMULATE
    from fedfora.training.settings import NO_EFFECT as TRAIN

    options = {"train": TRAIN, "simulate": SIMULATE, "predict": PREDICT}
    return {**options, "check privacy": CHECK_PRIVACY}


def sections_of_commands() -> dict[str, Iterable[Any]]:
    """Return what each command takes."""
    from fedfora.cli.chat import ChatArguments
    from fedfora.cli.check import PRIVACY_SECTIONS as CHECK_PRIVACY
    from fedfora.cli.check import SECTIONS as CHECK_DATA
    from fedfora.cli.coordinator import JournalChoice, RunChoice
    from fedfora.cli.demo import DemoArguments
    from fedfora.cli.keys import KeysArguments
    from fedfora.cli.rehearse import RehearsalArguments
    from fedfora.cli.report import ReportArguments
    from fedfora.cli.site import RequestArguments
    from fedfora.cli.verify import VerifyArguments
    from fedfora.cli.watch import WatchArguments
    from fedfora.deployment.settings import KitArguments, OwnTrainerArguments, ProvisionArguments
    from fedfora.evaluation.settings import SECTIONS as PREDICT
    from fedfora.evaluation.settings import AuditArguments, EvaluateArguments
    from fedfora.exporting.settings import SECTIONS as EXPORT
    from fedfora.federated.settings import SECTIONS as SIMULATE
    from fedfora.federated.settings import SecureAggregationArguments
    from fedfora.integrations.fate.settings import SECTIONS as FATE
    from fedfora.models.settings import ModelArguments
    from fedfora.training.settings import SECTIONS as TRAIN

    return {
        "train": TRAIN.values(),
        "simulate": SIMULATE.values(),
        "predict": PREDICT.values(),
        "evaluate": [EvaluateArguments],
        "export": EXPORT.values(),
        "chat": [ChatArguments, ModelArguments],
        "demo": [DemoArguments],
        "check data": CHECK_DATA,
        "audit": [AuditArguments],
        "keys": [KeysArguments],
        "verify": [VerifyArguments],
        "report": [ReportArguments],
        "watch": [WatchArguments],
        "provision": [ProvisionArguments],
        "check privacy": [*CHECK_PRIVACY, SecureAggregationArguments],
        "check site": [KitArguments, OwnTrainerArguments],
        "check federation": [KitArguments],
        "coordinator": [KitArguments],
        "coordinator run": [KitArguments, RunChoice],
        "coordinator journal": [KitArguments, JournalChoice],
        "site": [KitArguments],
        "site journal": [KitArguments],
        "site request": [RequestArguments],
        "rehearse": [RehearsalArguments],
        "fate": FATE.values(),
    }


def _table(section: Any, users: list[str], without: dict[str, Iterable[str]]) -> str:
    first = (section.__doc__ or "").strip().split("\n")[0]
    hints = get_type_hints(section)
    rows = [
        _row(item, hints[item.name], [u for u in users if item.name in without.get(u, ())])
        for item in fields(section)
    ]
    head = [f"## {first.rstrip('.')}", "", ", ".join(f"`{user}`" for user in users), ""]
    return "\n".join([*head, "| option | default | meaning |", "|---|---|---|", *rows, ""])


def _row(item: Field[Any], hint: Any, missing: list[str]) -> str:
    aliases = "".join(f"<br>`{alias}`" for alias in item.metadata.get("aliases", []))
    choices = item.metadata.get("choices") or [
        choice for choice in getattr(hint, "__args__", ()) if isinstance(choice, str)
    ]
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    allowed = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
    absent = f"; not in {', '.join(f'`{user}`' for user in missing)}" if missing else ""
    meaning = f"{item.metadata.get('help', '')}{allowed}{absent}".replace("|", "\\|")
    return (
        f"| `--{item.name}`{aliases} | {'' if shown in (None, '') else f'`{shown}`'} | {meaning} |"
    )
