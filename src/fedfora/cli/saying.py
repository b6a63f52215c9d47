"""What a command says before its work shows, and how a daemon tells what happens."""

import sys
from datetime import UTC, datetime


def announce(text: str) -> None:
    """Say what is going to run, and why nothing more is to be seen for some seconds."""
    print(f"{text}; loading PyTorch and its libraries ...", flush=True)


def announce_loading(command: str) -> None:
    """Fill the seconds in which PyTorch and its libraries load, for who looks at a terminal."""
    if sys.stderr.isatty():
        print(f"fedfora {command}: loading PyTorch and its libraries ...", file=sys.stderr)


def timestamped(text: str) -> str:
    """Return a line with the time of day before it."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}"


def log_line(text: str) -> None:
    """Print a line of a daemon."""
    print(timestamped(text), flush=True)
