"""fedfora verify DIR: check and show the signed provenance of an adapter or a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfora.config import ConfigParser, flag


@dataclass
class VerifyArguments:
    """What to check."""

    model_dir: str | None = flag(None, "directory of an adapter or a checkpoint")


def run(argv: Sequence[str]) -> None:
    """Parse, check, and print who signed what."""
    parser = ConfigParser([VerifyArguments], description=__doc__, first="model_dir")
    (arguments,) = parser.parse(argv)
    import yaml

    from fedfora.protection.keys import TRUSTED, trusted_keys
    from fedfora.protection.provenance import verify_directory

    if arguments.model_dir is None or not Path(arguments.model_dir).is_dir():
        raise ValueError(f"--model_dir {arguments.model_dir or 'DIR'}: no such directory")
    provenance = verify_directory(Path(arguments.model_dir))
    if provenance is None:
        raise ValueError(f"{arguments.model_dir} is not signed")
    trust = "trusted" if trusted_keys() is not None else f"unknown: {TRUSTED} names no keys"
    print(f"signed by {provenance.signer} ({trust}); files and record match what was signed")
    print(yaml.safe_dump(provenance.facts, sort_keys=True, allow_unicode=True), end="")
