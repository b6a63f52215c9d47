"""fedfora keys: make this machine's keys, for signing and for encryption at rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfora.config import ConfigParser, flag


@dataclass
class KeysArguments:
    """Which keys to make; existing files are never overwritten."""

    signing_key: str | None = flag(
        None, "file for a new Ed25519 key; its public half is written next to it"
    )
    encryption_key: str | None = flag(None, "file for a new key for encryption at rest")


def run(argv: Sequence[str]) -> None:
    """Parse, make the keys, and say how they are used."""
    (arguments,) = ConfigParser([KeysArguments], description=__doc__).parse(argv)
    from fedfora.protection import keys

    if arguments.signing_key is None and arguments.encryption_key is None:
        raise ValueError("nothing to make: give --signing_key FILE, --encryption_key FILE, or both")
    if arguments.signing_key is not None:
        path = Path(arguments.signing_key)
        print(f"signing key {keys.make_signing_key(path)}")
        print(f"  sign with it:     export {keys.SIGNING}={path}")
        print(f"  trust it:         export {keys.TRUSTED}={path}.pub")
    if arguments.encryption_key is not None:
        path = Path(arguments.encryption_key)
        keys.make_encryption_key(path)
        print("encryption key; losing it means losing what was encrypted with it")
        print(f"  encrypt with it:  export {keys.ENCRYPTION_FILE}={path}")
