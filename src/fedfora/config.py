"""One parser for the three ways of configuring a run: command line, YAML, Flower's run config.

A mapping, from YAML or from Flower, is turned into the words that would have been typed, so types,
choices and unknown names are checked in one place whatever the source.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import yaml

Scalar = str | int | float | bool

_NAME = re.compile(r"[A-Za-z0-9_-]+")
# What other programs call it, or what it is elsewhere, to what it is here.
_MEANT = {
    **dict.fromkeys(("int4", "4bit", "4", "fp4", "bnb", "q4"), "nf4"),
    **dict.fromkeys(("8bit", "8", "llm.int8", "q8"), "int8"),
    **dict.fromkeys(("null", "no", "false", "fp32", "fp16", "bf16"), "none"),
    **dict.fromkeys(("ollama", "llama.cpp", "llamacpp"), "gguf"),
    **dict.fromkeys(("peft", "adapter", "vllm"), "lora"),
    **{"--lr": "--learning_rate", "--epochs": "--num_train_epochs", "--rank": "--lora_rank"},
}
_SHORT_OPTION = re.compile(r"-[A-Za-z](?!nf$)[^ ]*$")  # -h; -inf is a number


class ConfigError(ValueError):
    """A mistake in what the user typed; the message names it and the remedy, if there is one."""


def flag(default: Any, help: str, *aliases: str, choices: Iterable[str] | None = None) -> Any:
    """Return a dataclass field that becomes a command-line flag of the same name.

    Args:
        default: Default value; a list or dict is copied for each instance.
        help: One line for `--help`.
        *aliases: Other spellings, e.g. the original program's, with their dashes.
        choices: Allowed values, where the type does not already say so.
    """
    metadata: dict[str, Any] = {"help": help, "aliases": list(aliases)}
    if choices is not None:
        metadata["choices"] = list(choices)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# transformers' `HfArgumentParser`, without the rest of transformers.
#
# The parser's file needs the standard library and YAML; the package around it takes most of a
# second to load. So the file is loaded alone, unless the package is there already.


if TYPE_CHECKING:
    from transformers.hf_argparser import HfArgumentParser


def _load() -> Any:
    package = None if "transformers" in sys.modules else importlib.util.find_spec("transformers")
    for place in (package and package.submodule_search_locations) or ():
        file = Path(place) / "hf_argparser.py"
        spec = importlib.util.spec_from_file_location("fedfora._hf_argparser", file)
        if file.is_file() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module.HfArgumentParser
    from transformers.hf_argparser import HfArgumentParser

    return HfArgumentParser


if not TYPE_CHECKING:
    HfArgumentParser = _load()


def check_ranges(arguments: Any, intervals: Mapping[str, Iterable[str]]) -> None:
    """Raise where a number is not within its interval; None is left out.

    Args:
        arguments: A dataclass of flags.
        intervals: From an interval such as "[0, 1)" or "(0, inf)" to the flags within it.

    Raises:
        ConfigError: Naming flag, interval and value.
    """
    for interval, names in intervals.items():
        low, high = interval[1:-1].split(", ")
        allowed = f"at least {low}" if interval[0] == "[" else f"above {low}"
        allowed = allowed if high == "inf" else f"in {interval}"
        for name in names:
            value = getattr(arguments, name)
            for number in value if isinstance(value, list) else [value]:
                if number is None:
                    continue
                above = number >= float(low) if interval[0] == "[" else number > float(low)
                below = number <= float(high) if interval[-1] == "]" else number < float(high)
                if not (above and below):  # as of what is not a number
                    raise ConfigError(f"--{name} must be {allowed}, got {value}")


def refuse(*rules: tuple[bool, str]) -> None:
    """Raise for the first rule that is broken: `(broken, message)`, as a table that reads.

    Raises:
        ConfigError: With its message.
    """
    for broken, message in rules:
        if broken:
            raise ConfigError(message)


def read_yaml(path: Path, flag: str) -> Any:
    """Return what a YAML file holds.

    Args:
        path: The file.
        flag: What the message begins with.

    Raises:
        ConfigError: If it cannot be read, in one line.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML lets through whatever its constructors raise
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{flag}{path} is not valid YAML: {said or type(error).__name__}"
        ) from error


class ConfigParser(HfArgumentParser):  # type: ignore[misc]  # transformers is untyped here
    """`HfArgumentParser` plus `--config FILE`, without abbreviations, with hints for mistakes."""

    def __init__(self, dataclass_types: Iterable[Any], **kwargs: Any) -> None:
        kwargs.setdefault("usage", "%(prog)s [--config FILE.yaml] [OPTIONS]")
        # Options that may be nothing at all, an empty list, a mapping.
        self._may_be: dict[type, set[str]] = {NoneType: set(), list: set(), dict: set()}
        super().__init__(
            list(dataclass_types),
            allow_abbrev=False,
            formatter_class=OptionHelp,
            epilog="--config FILE.yaml sets any of these; the command line wins. In names, dashes "
            "may stand\nfor underscores. [Brackets] hold defaults.",
            **kwargs,
        )

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """Put the options of each dataclass under a heading of their own, its first sentence."""
        heading = (dtype.__doc__ or "").split("\n")[0].rstrip(".")
        group = self.add_argument_group(heading)
        hints = get_type_hints(dtype)
        for item in dataclasses.fields(dtype):
            item.type = hints[item.name]
            self._parse_dataclass_field(group, item)
            if NoneType in get_args(hints[item.name]):
                self._may_be[NoneType].add(item.name)
            if "dict" in str(hints[item.name]):
                self._may_be[dict].add(item.name)
            if getattr(item.default_factory, "__self__", None) == []:
                self._may_be[list].add(item.name)

    def parse(
        self, argv: Sequence[str], defaults: Mapping[str, Any] | None = None
    ) -> tuple[Any, ...]:
        """Return one instance per dataclass type.

        Values from `--config FILE` are defaults; words of the command line override them.

        Args:
            argv: What was typed.
            defaults: Values that both override, e.g. those of a run that is gone on with.

        Raises:
            ConfigError: On any mistake, whatever its source.
        """
        return self._parse_words(self.words(defaults or {}) + self._with_files(argv))

    def parse_mapping(self, mapping: Mapping[str, Any]) -> tuple[Any, ...]:
        """Like `parse`, for a mapping of option names (`lora_rank` or `lora-rank`) to values."""
        return self._parse_words(self.words(mapping))

    def error(self, message: str) -> NoReturn:
        """Raise where argparse would print and exit.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(message)

    def _with_files(self, argv: Sequence[str]) -> list[str]:
        """Return all words: those of `--config` files first, so that typed ones override them."""
        from_file: list[str] = []
        typed: list[str] = []
        words = iter(argv)
        for word in words:
            if word == "--config" or word.startswith("--config="):
                path = word.removeprefix("--config").removeprefix("=") or next(words, "")
                from_file += self.words(self._read(Path(path)))
            else:
                typed.append(word)
        return from_file + typed

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            self.error(f"--config: no such file: {path}")
        mapping = read_yaml(path, "--config: ")
        if not isinstance(mapping, dict):
            self.error(f"--config: {path}: expected a mapping of option names to values")
        return mapping

    def words(self, mapping: Mapping[str, Any]) -> list[str]:
        """Return what one would type for a mapping of option names to values.

        Raises:
            ConfigError: If a name or a value could not be typed.
        """
        words: list[str] = []
        for key, value in mapping.items():
            if not _NAME.fullmatch(str(key)) or key == "help":
                self.error(f"unknown option {key!r}")
            action = self._option_string_actions.get("--" + str(key).replace("-", "_"))
            if value in (None, []) and action is not None:
                if action.dest not in self._may_be[type(value)]:
                    allowed = f"; one of {', '.join(map(str, action.choices or ()))}"
                    self.error(f"--{key}: nothing given{allowed if action.choices else ''}")
                action.default = value  # there is no word for "nothing"
                continue
            if isinstance(value, str) and action is not None and action.nargs == "+":
                value = value.split()  # Flower's run config has no lists
            if isinstance(value, dict) and (action is None or action.dest in self._may_be[dict]):
                value = json.dumps(value)
            many = value if isinstance(value, list) else [value]
            if isinstance(value, list) and action is not None and action.nargs != "+":
                self.error(f"--{key} takes one value, got {value}")
            if strange := [item for item in many if item is None or isinstance(item, list | dict)]:
                self.error(f"--{key}: {strange[0]!r} is no value")
            if hidden := [item for item in many if _is_option(item)]:
                self.error(f"--{key}: {hidden[0]!r} is no value, but an option")
            words += [f"--{key}", *(_word(item) for item in many)]
        return words

    def given(self, argv: Sequence[str]) -> frozenset[str]:
        """Return the names of the options that were said, on the command line or in a file."""
        return frozenset(
            action.dest
            for word in self._with_files(argv)
            if (action := self._option_string_actions.get(word.split("=")[0]))
        )

    def _parse_words(self, words: list[str]) -> tuple[Any, ...]:
        try:
            *parsed, rest = self.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
        except argparse.ArgumentTypeError as error:
            self.error(str(error))
        if rest:
            self.error(self._unknown(rest[0]))
        return tuple(parsed)

    def _unknown(self, word: str) -> str:
        name = word.split("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        asked = "--" + name.lstrip("-").replace("-", "_")
        close = [_MEANT.get(asked)] if _MEANT.get(asked) in options else []
        close = close or difflib.get_close_matches(asked, options, n=1, cutoff=0.7)
        close = close or difflib.get_close_matches(name, options, n=1, cutoff=0.7)
        close = close or [option for option in options if option.endswith(f"_{asked[2:]}")]
        names = " or ".join(filter(None, close))
        remedy = f"did you mean {names}?" if close else f"{self.prog} --help lists them all"
        return f"unknown option {name}; {remedy}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Add the nearest allowed value to argparse's message."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            choices = [str(choice) for choice in action.choices or ()]
            meant = _MEANT.get(str(value).lower())
            close = [meant] if meant in choices else difflib.get_close_matches(str(value), choices)
            if close:
                error.message += f"; did you mean {close[0]!r}?"
            raise


def to_mapping(*settings: Any) -> dict[str, Scalar]:
    """Return the fields that differ from their defaults, as Flower's flat run config holds them.

    `ConfigParser.parse_mapping` is the inverse: lists travel as words, dictionaries as JSON.
    """
    mapping: dict[str, Scalar] = {}
    for instance in settings:
        for item in dataclasses.fields(instance):
            value = getattr(instance, item.name)
            default = (
                item.default_factory()
                if item.default_factory is not dataclasses.MISSING
                else item.default
            )
            if value == default or value is None:
                continue
            if isinstance(value, list):
                value = " ".join(map(str, value))
            mapping[item.name] = json.dumps(value) if isinstance(value, dict) else value
    return mapping


def _is_option(value: Any) -> bool:
    """Say whether argparse could take a value for an option; a mapping may come from afar."""
    text = str(value)
    return text.startswith("--") or bool(_SHORT_OPTION.match(text))


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# Options to the text of `--help`: one spelling each, grouped under headings, short usage.


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
