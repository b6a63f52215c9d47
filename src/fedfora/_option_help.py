"""Options to the text of `--help`: one spelling each, grouped under headings, short usage."""

import argparse
from collections.abc import Sequence

_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


class OptionHelp(argparse.RawDescriptionHelpFormatter):
    """One line or two for each option: its name, its aliases, what it means, its default.

    That dashes may stand for underscores is said once and not with each option.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def add_argument(self, action: argparse.Action) -> None:
        """Leave out the opposite of a switch, which its own line names."""
        if not _is_opposite(action):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = spellings(action.option_strings)
        if action.default is True and isinstance(action.nargs, str):
            names = [name.replace("--", "--[no_]", 1) for name in names]
        value = _value(action)
        return ", ".join(names) + (f" {value}" if value else "")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("%", "%%")
        default = action.default
        nothing = default is None or isinstance(default, bool) or default in ("", [])
        if nothing or "; default" in text or default is argparse.SUPPRESS:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} [{shown}]"


def spellings(options: Sequence[str]) -> list[str]:
    """Return option names without those that only write dashes for another's underscores."""
    with_underscores = [name for name in options if "_" in name]
    twins = {"--" + name[2:].replace("_", "-") for name in with_underscores}
    return [name for name in options if name not in twins]


def _is_opposite(action: argparse.Action) -> bool:
    return action.const is False and any(o.startswith("--no_") for o in action.option_strings)


def _value(action: argparse.Action) -> str:
    if action.nargs in (0, "?"):
        return ""
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    value = _METAVARS.get(action.type, "TEXT")  # type: ignore[call-overload]
    return f"{value} ..." if action.nargs == "+" else value
