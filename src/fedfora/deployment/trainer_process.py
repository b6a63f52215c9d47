"""The process of a site's trainer: reads the kit, and serves; loads no more than that takes."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedfora.deployment.kit import SiteKit, read_kit

# Libraries import these in passing: transformers' Trainer datasets, and with it pandas, PyArrow and
# aiohttp, to recognize its data sets, though a site's rows are lists; a detection loss SciPy.
NOT_FOR_TRAINING = ("datasets", "scipy", "sklearn")


def main(directory: str) -> None:
    """Serve the site whose kit lies in a directory."""
    with hide_packages(*NOT_FOR_TRAINING):
        from fedfora.deployment.trainer import serve_site
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    kit = read_kit(directory, SiteKit)
    os.chdir(kit.directory)  # a relative path in kit.yaml is one from there
    serve_site(kit)


@contextmanager
def hide_packages(*packages: str) -> Iterator[None]:
    """Let packages seem not installed while the block runs; later imports find them.

    Packages that are loaded already stay.

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


if __name__ == "__main__":
    main(sys.argv[1])
