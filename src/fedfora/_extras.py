"""Modules of an optional extra: loaded where they are used, or the command that installs them."""

from importlib import import_module
from typing import Any


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
