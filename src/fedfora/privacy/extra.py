"""Loads what the extra `privacy` brings, or says how to install it."""

from importlib import import_module
from typing import Any


def need(module: str) -> Any:
    """Return a module of the extra.

    Raises:
        ValueError: If it is not installed, with the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise ValueError(f'{package} is missing: pip install "fedfora[privacy]"') from error
