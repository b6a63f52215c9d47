"""Keeps packages out of memory that libraries import in passing and a site's trainer does not use.

transformers' Trainer imports datasets, and with it pandas, PyArrow and aiohttp, to know its data
sets when it meets them; the rows of a site are lists. A loss for object detection imports SciPy.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

NOT_FOR_TRAINING = ("datasets", "scipy", "sklearn")


@contextmanager
def hide_packages(*packages: str) -> Iterator[None]:
    """Let packages be not installed while the block runs; those that are loaded stay.

    Whoever imports them afterwards gets them.

    Args:
        *packages: Names to import.
    """
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python then says "not found"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
