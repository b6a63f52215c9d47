"""fedfora info: versions and hardware."""

from collections.abc import Sequence

from fedfora.config import ConfigParser


def run(argv: Sequence[str]) -> None:
    """Print versions and hardware as YAML."""
    ConfigParser([], description=__doc__).parse(argv)
    import torch  # noqa: F401  # so that GPUs are listed
    import yaml

    from fedfora.reporting.record import environment

    print(yaml.safe_dump(environment(), sort_keys=False), end="")
