"""Named implementations, the package's one extension mechanism; names that appear in messages."""

import difflib
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

F = TypeVar("F")


class Registry(dict[str, F]):
    """Maps a public name to what implements it, in the order of registration.

    A registry is filled by decorating functions (or by `add`) in the module that owns it, so adding
    an implementation touches that module alone.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, name: str, entry: F) -> F:
        """Register `entry` as `name` and return it.

        Raises:
            ValueError: If the name is taken.
        """
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is already registered")
        self[name] = entry
        return entry

    def register(self, name: str) -> Callable[[F], F]:
        """Return a decorator that registers what it decorates."""
        return lambda entry: self.add(name, entry)

    def __missing__(self, name: str) -> F:
        """Refuse a name that nobody registered, naming the nearest and the known ones."""
        raise ValueError(unknown(self.kind, name, sorted(self)))


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that does not exist: the nearest one and all known ones."""
    names = list(known)
    return f"unknown {kind} {name!r}{nearest(name, names)} (known: {', '.join(names)})"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that asks whether the nearest known name was meant."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, e.g. 1 row, 2,400 rows."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def printable(text: object, most: int = 200, keep: str = "") -> str:
    """Return untrusted text, shortened and without control characters but for those in `keep`."""
    shown = "".join(c if c.isprintable() or c in keep else " " for c in str(text)[: 4 * most])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def need(module: str, extra: str = "privacy") -> Any:
    """Return a module that an extra brings.

    Raises:
        ValueError: If it is not installed, with the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise ValueError(f'{package} is missing: pip install "fedfora[{extra}]"') from error


def try_hub() -> str:
    """Return why the Hugging Face Hub cannot be reached; "" if it can be, or if that is unknown.

    If not, its library works offline until it can: it would retry for 24 seconds for each file.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if getproxies() or os.environ.keys() & {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}:
        return ""
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), timeout=3).close()
        constants.HF_HUB_OFFLINE = False
    except OSError as error:
        constants.HF_HUB_OFFLINE = True
        return f"{url.hostname} cannot be reached ({error}), and it is not in the Hub's cache"
    return ""


def installed_version(package: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
