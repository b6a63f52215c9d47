"""Something that is drawn again and again below the lines of a terminal."""

from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live


def start_live(console: Console, render: Callable[[], RenderableType]) -> Live | None:
    """Draw below the lines until the result is stopped; None where there is no terminal.

    Args:
        console: Where to.
        render: What to draw, asked four times a second.
    """
    if not console.is_terminal:
        return None
    live = Live(get_renderable=render, console=console, refresh_per_second=4, transient=True)
    live.start()
    return live
