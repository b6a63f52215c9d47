"""How a daemon tells what happens: one line at a time, with the time of day."""

from datetime import UTC, datetime


def stamped(text: str) -> str:
    """Return a line with the time of day before it."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}"


def say(text: str) -> None:
    """Print a line."""
    print(stamped(text), flush=True)
