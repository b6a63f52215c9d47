"""One parser for the three ways of configuring a run: command line, YAML, Flower's run config.

Options are fields of dataclasses, made by `flag`. Types, choices, ranges and unknown names are
checked in one place whatever the source.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

Scalar = str | int | float | bool

# Other programs' names for an option or a value, to the name here.
_MEANT = {
    **dict.fromkeys(("int4", "4bit", "4", "fp4", "bnb", "q4"), "nf4"),
    **dict.fromkeys(("8bit", "8", "llm.int8", "q8"), "int8"),
    **dict.fromkeys(("null", "no", "false", "fp32", "fp16", "bf16"), "none"),
    **dict.fromkeys(("ollama", "llama.cpp", "llamacpp"), "gguf"),
    **dict.fromkeys(("peft", "adapter", "vllm"), "lora"),
    **{"--lr": "--learning_rate", "--epochs": "--num_train_epochs", "--rank": "--lora_rank"},
}
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}
_OPTION = re.compile(r"--|-[A-Za-z](?!nf$)[^ ]*$")  # -h is one, -inf is a number
FEW = 16  # a command with at most this many options shows them all in `--help`


class ConfigError(ValueError):
    """A mistake in what the user typed; the message names it and the remedy, if there is one."""


def flag(
    default: Any,
    help: str,
    *aliases: str,
    choices: Iterable[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    within: str | None = None,
    often: bool = False,
) -> Any:
    """Return a dataclass field that becomes a command-line flag of the same name.

    Args:
        default: Default value; a list is copied for each instance.
        help: One line for `--help`.
        *aliases: Other spellings, e.g. the original program's, with their dashes.
        choices: Allowed values, where the type does not already say so.
        least: The smallest number allowed; like `above` and `within` for each item of a list, and
            checked by `Options`.
        above: A finite number must be larger than this one.
        within: The interval allowed, e.g. "[0, 1)".
        often: Whether `--help` shows it; `--help-all` shows every flag.
    """
    metadata: dict[str, Any] = {"help": help, "aliases": list(aliases), "often": often}
    metadata["choices"] = None if choices is None else list(choices)
    if least is not None or above is not None:
        within = f"[{least}, inf)" if above is None else f"({above}, inf)"
    metadata["within"] = within
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base class of every dataclass of flags: refuses numbers outside their flag's range."""

    def __post_init__(self) -> None:
        """Check every number; conflicts between flags are for the subclass to check.

        Raises:
            ConfigError: Naming the flag, its range and the value.
        """
        for item in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value, interval = getattr(self, item.name), item.metadata.get("within")
            if interval is None or value is None:
                continue
            low, high = map(float, interval[1:-1].split(","))
            allowed = f"in {interval}"
            if math.isinf(high):
                allowed = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
            for number in value if isinstance(value, list) else [value]:
                above = low <= number if interval[0] == "[" else low < number
                below = number <= high if interval[-1] == "]" else number < high
                if not (above and below):  # both are false for NaN
                    finite = "finite and " if number == math.inf else ""
                    raise ConfigError(f"--{item.name} must be {finite}{allowed}, got {number}")


def refuse(*rules: tuple[bool, str]) -> None:
    """Raise for the first broken rule of a table of `(broken, message)`.

    Raises:
        ConfigError: With its message.
    """
    for broken, message in rules:
        if broken:
            raise ConfigError(message)


def read_yaml(path: Path, flag: str = "") -> Any:
    """Return what a YAML file holds; a message about it begins with `flag`.

    Raises:
        ConfigError: If it cannot be read, in one line.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{flag}{path} cannot be read: {reason}") from error
    except Exception as error:  # PyYAML passes on whatever its constructors raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{flag}{path} is not valid YAML: {reason}") from error


class ConfigParser(argparse.ArgumentParser):
    """Dataclasses of flags to instances; `--config FILE` gives values that typed words override.

    Args:
        sections: The dataclasses, in the order of `--help`.
        prog: The command; default: what the description says before its first colon.
        description: What `--help` says first.
        first: The option that takes the words before the first flag, as in `report RUN...`.
        without: Options of the sections that have no effect in this command and are not offered.
    """

    def __init__(
        self,
        sections: Iterable[Any],
        *,
        prog: str | None = None,
        description: str | None = None,
        first: str | None = None,
        without: Collection[str] = (),
    ) -> None:
        super().__init__(
            prog=prog or (description or "").partition(":")[0] or None,
            usage="%(prog)s [--config FILE.yaml] [OPTIONS]",
            description=description,
            formatter_class=_OptionHelp,
            argument_default=argparse.SUPPRESS,
            add_help=False,
            allow_abbrev=False,
        )
        self.sections, self.first, self.without = list(sections), first, frozenset(without)
        self._shown: dict[str, bool] = {}  # option to whether `--help` shows it
        self._empty: dict[str, list[Any]] = {}  # option to None or [], where it may be empty
        for section in self.sections:
            # Its first sentence is the heading of its options.
            group = self.add_argument_group((section.__doc__ or "").split("\n")[0].rstrip("."))
            hints = get_type_hints(section)
            for item in dataclasses.fields(section):
                if item.name not in self.without:
                    self._add_option(group, item, hints[item.name])
        if len(self._shown) <= FEW:
            self._shown = dict.fromkeys(self._shown, True)
        for names in (("-h", "--help"), ("--help_all",)):
            self.add_argument(*names, action=_Help, nargs=0, help=argparse.SUPPRESS)

    def _add_option(self, group: Any, item: Any, hint: Any) -> None:
        default = item.default_factory() if callable(item.default_factory) else item.default
        kind, choices = hint, item.metadata["choices"]
        self._empty[item.name] = [[]] if default == [] else []
        if get_origin(kind) in (Union, UnionType):
            self._empty[item.name].append(None)
            (kind,) = (each for each in get_args(kind) if each is not NoneType)
        options: dict[str, Any] = {}
        if many := get_origin(kind) is list:
            (kind,), options["nargs"] = get_args(kind), "+"
        if get_origin(kind) is Literal:
            kind, choices = str, list(get_args(kind))
        names = [f"--{item.name}", *item.metadata["aliases"]]
        if kind is bool:
            options |= {"nargs": "?", "const": True, "type": _boolean, "metavar": ""}
        else:
            metavar = "{" + ",".join(choices) + "}" if choices else _METAVARS[kind]
            options |= {"type": kind, "choices": choices}
            options["metavar"] = f"{metavar} ..." if many else metavar
        text = item.metadata["help"].replace("%", "%%")
        if not (default is None or kind is bool or default in ("", []) or "; default" in text):
            text += f" [{' '.join(map(str, default)) if many else default}]"
        action = group.add_argument(*names, dest=item.name, help=text, **options)
        if default is True:
            action.metavar = "[no_]"
            opposite = f"--no_{item.name}"
            self.add_argument(
                opposite, dest=item.name, action="store_false", help=argparse.SUPPRESS
            )
        self._shown[item.name] = item.metadata["often"]

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance per dataclass; typed words override a file that `--config` names.

        Raises:
            ConfigError: On any mistake, whatever its source.
        """
        return self.build(self.values(argv))

    def parse_mapping(self, mapping: Mapping[str, Any]) -> tuple[Any, ...]:
        """Like `parse`, for a mapping of option names (`lora_rank` or `lora-rank`) to values."""
        return self.build(self.typed(mapping))

    def build(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one instance per dataclass from what `values` or `typed` returned."""
        return tuple(
            section(**{n: values[n] for n in section.__dataclass_fields__ if n in values})
            for section in self.sections
        )

    def values(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the options that were given, by name, on the command line or in a file.

        Raises:
            ConfigError: On any mistake.
        """
        from_files: dict[str, Any] = {}
        words: list[str] = []
        rest = iter(argv)
        for word in rest:
            name, equals, value = word.partition("=")
            if name == "--config":
                from_files |= self.read(value or next(rest, ""))
            elif word.startswith("--"):
                words.append(f"--{name[2:].replace('-', '_')}{equals}{value}")
            else:
                words.append(word)
        if self.first is not None:
            words = list(self._with_first(words))
        typed, unknown = self.parse_known_args(words)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return from_files | vars(typed)

    def _with_first(self, words: Sequence[str]) -> Iterator[str]:
        """Insert the option for words that have none: at the start, or after a switch."""
        before = "--switch"
        for word in words:
            action = self._option_string_actions.get(before)
            free = before == "--switch" or (action is not None and action.type is _boolean)
            if free and not word.startswith("-") and word.lower() not in _BOOLEANS:
                if action is not None:
                    yield "true"
                yield f"--{self.first}"
            before = word
            yield word

    def read(self, path: str | Path) -> dict[str, Any]:
        """Return the options that a YAML file gives.

        Raises:
            ConfigError: If it does not exist, is not YAML, or holds a mistake.
        """
        if not Path(path).is_file():
            self.error(f"--config: no such file: {path}")
        mapping = read_yaml(Path(path), "--config: ")
        if not isinstance(mapping, dict):
            self.error(f"--config: {path}: expected a mapping of option names to values")
        return self.typed(mapping)

    def typed(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a mapping from option names, each of its option's type.

        Raises:
            ConfigError: If a name is unknown or a value does not fit.
        """
        values = {}
        for key, value in mapping.items():
            action = self._option_string_actions.get(
                f"--{key}".replace("-", "_").replace("__", "--", 1)
            )
            if action is None or action.dest not in self._shown or action.nargs == 0:
                self.error(self._unknown(f"--{key}"))
            values[action.dest] = self._typed(action, str(key), value)
        return values

    def _typed(self, action: argparse.Action, key: str, value: Any) -> Any:
        many = action.nargs == "+"
        if many and isinstance(value, str):
            value = value.split()  # Flower's run config has no lists
        if value is None or value == []:
            if value not in self._empty[action.dest]:
                allowed = f"; one of {', '.join(action.choices)}" if action.choices else ""
                self.error(f"--{key}: nothing given{allowed}")
            return value
        if isinstance(value, list) and not many:
            self.error(f"--{key} takes one value, got {value}")
        items = value if isinstance(value, list) else [value]
        if strange := [item for item in items if item is None or isinstance(item, list | dict)]:
            self.error(f"--{key}: {strange[0]!r} is not a valid value")
        if hidden := [item for item in items if _OPTION.match(str(item))]:
            self.error(f"--{key}: {hidden[0]!r} is an option, not a value")
        try:
            typed = [
                self._get_value(action, str(item).lower() if isinstance(item, bool) else str(item))
                for item in items
            ]
            for item in typed:
                self._check_value(action, item)
        except argparse.ArgumentError as error:
            self.error(str(error))
        return typed if many else typed[0]

    def error(self, message: str) -> NoReturn:
        """Raise where argparse would print and exit.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(message)

    def _unknown(self, word: str) -> str:
        name = word.split("=")[0]
        if not word.startswith("-"):
            return f"{word!r} belongs to no option; {self.prog} --help-all lists them all"
        actions = self._option_string_actions
        options = [option for option in actions if actions[option].dest in self._shown]
        asked = "--" + name.lstrip("-").replace("-", "_")
        if asked[2:] in self.without:
            return f"{asked} has no effect in {self.prog}"
        close = [_MEANT[asked]] if _MEANT.get(asked) in options else []
        close = close or difflib.get_close_matches(asked, options, n=1, cutoff=0.7)
        close = close or [option for option in options if option.endswith(f"_{asked[2:]}")]
        names = " or ".join(close)
        remedy = f"did you mean {names}?" if close else f"{self.prog} --help-all lists them all"
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

    def format_help(self, whole: bool = False) -> str:
        """Return the text of `--help`, or of `--help-all`."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            actions = [a for a in group._group_actions if whole or self._shown.get(a.dest)]
            formatter.start_section(group.title)
            formatter.add_arguments([a for a in actions if a.dest in self._shown])
            formatter.end_section()
        more = len(self._shown) - sum(self._shown.values())
        if more and not whole:
            formatter.add_text(f"{self.prog} --help-all shows {more} more options.")
        if self._shown:
            formatter.add_text(
                "--config FILE.yaml sets any of these; the command line wins. In names, dashes may "
                "stand\nfor underscores. [Brackets] hold defaults."
            )
        return formatter.format_help()


class _Help(argparse.Action):
    """Prints the help, for the common options or for all of them, and exits."""

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(whole=self.dest == "help_all"), end="")
        parser.exit()


class _OptionHelp(argparse.RawDescriptionHelpFormatter):
    """One line or two for each option: its name, its aliases, what it means, its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names, metavar = list(action.option_strings), str(action.metavar)
        if metavar == "[no_]":
            names, metavar = [name.replace("--", "--[no_]", 1) for name in names], ""
        return f"{', '.join(names)} {metavar}".rstrip()


def to_mapping(*settings: Any) -> dict[str, Scalar]:
    """Return the fields that differ from their defaults, as Flower's flat run config holds them.

    `ConfigParser.parse_mapping` is the inverse: lists travel as words.
    """
    mapping: dict[str, Scalar] = {}
    for instance in settings:
        default = type(instance)()
        for name, value in vars(instance).items():
            if value != getattr(default, name) and value is not None:
                mapping[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return mapping


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return _BOOLEANS[text.lower()]
