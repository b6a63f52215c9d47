"""The Flower app that a deployed run consists of: three small files, and the run's settings."""

import json
from collections.abc import Mapping
from pathlib import Path

from fedfora.config import Scalar
from fedfora.reporting.record import write_text

PACKAGE = "fedfora_app"

_PROJECT = """\
[project]
name = "fedfora-app"
version = "1.0.0"
description = "A federation that learns one FoRA adapter"
license = "Apache-2.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedfora"

[tool.flwr.app.components]
serverapp = "fedfora_app.server:app"
clientapp = "fedfora_app.client:app"

[tool.flwr.app.config]
"""
_FILES = {
    "__init__.py": '"""All that travels of a run. Each side runs what it installed."""\n',
    "server.py": (
        '"""The coordinator\'s side."""\n\nfrom fedfora.deployment.server_app import app\n\n'
        '__all__ = ["app"]\n'
    ),
    "client.py": (
        '"""A site\'s side."""\n\nfrom fedfora.deployment.client_app import app\n\n'
        '__all__ = ["app"]\n'
    ),
}


def write_app(directory: Path, run_config: Mapping[str, Scalar]) -> None:
    """Write the app.

    Args:
        directory: Where; what stands there is overwritten.
        run_config: The settings that travel.
    """
    package = directory / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        write_text(package / name, text)
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in run_config.items())
    write_text(directory / "pyproject.toml", _PROJECT + settings)
