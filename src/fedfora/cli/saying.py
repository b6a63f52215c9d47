"""How a daemon tells what happens: one line at a time, with the time of day."""

from datetime import UTC, datetime


def say(text: str) -> None:
    """Print a line."""
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}", flush=True)
