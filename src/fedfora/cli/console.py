"""Keeps libraries from talking over what a command shows."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from fedfora.registry import counted, printable, unknown

if TYPE_CHECKING:
    from fedfora.deployment.checks import CheckResult

NOISY = ("flwr", "bitsandbytes", "bitsandbytes.backends.utils")


class Once(logging.Filter):
    """Lets each message through once: rows are read several times, their faults reported once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the message is new."""
        message = printable(record.getMessage(), 10**6, "\n")
        record.msg, record.args = message, None  # it may quote a row
        new = message not in self._said
        self._said.add(message)
        return new


def silence_libraries() -> None:
    """Show warnings of fedfora and errors of everybody else; no bars but our own.

    Loads none of those libraries: each is silenced once something else loads it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # e.g. of transformers' reader of GGUF files
    handler = logging.StreamHandler()
    handler.addFilter(Once())
    logging.basicConfig(
        level=logging.ERROR, format="%(levelname)s: %(message)s", handlers=[handler]
    )
    logging.getLogger("fedfora").setLevel(logging.WARNING)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    register_post_import_hook(_quiet_transformers, "transformers")
    register_post_import_hook(_quiet_datasets, "datasets")


def _quiet_transformers(transformers: Any) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _quiet_datasets(datasets: Any) -> None:
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs is also raised


def runs_part(argv: Sequence[str], parts: Mapping[str, Callable[[Sequence[str]], None]]) -> bool:
    """Run the part of a command that its first word names; return whether there was one.

    Raises:
        ValueError: If the first word is neither a flag nor the name of a part.
    """
    if not argv or argv[0].startswith("-"):
        return False
    if argv[0] not in parts:
        raise ValueError(unknown("word", argv[0], parts))
    parts[argv[0]](argv[1:])
    return True


def announce(text: str) -> None:
    """Say what is about to run, and why nothing more will appear for some seconds."""
    print(f"{text}; loading PyTorch and its libraries ...", flush=True)


def announce_loading(command: str) -> None:
    """Tell a terminal why nothing happens while PyTorch and its libraries load."""
    if sys.stderr.isatty():
        print(f"fedfora {command}: loading PyTorch and its libraries ...", file=sys.stderr)


def timestamped(text: str) -> str:
    """Return a line with the time of day before it."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}"


def print_results(results: "Iterable[CheckResult]") -> None:
    """Print a line for each check as soon as it is done.

    Raises:
        ValueError: If some failed, so that the exit status says so.
    """
    passed = []
    for result in results:
        print(result.line(), flush=True)
        passed.append(result.ok)
    if failed := passed.count(False):
        raise ValueError(f"{failed} of {counted(len(passed), 'check')} failed")


def log_line(text: str) -> None:
    """Print a line of a daemon."""
    print(timestamped(text), flush=True)
