"""Where an adapter or a checkpoint comes from, signed, and checked before it is used.

`provenance.json` holds a statement (what the files are, by SHA-256, and how they came about) and an
Ed25519 signature of it. A signature shows that the holder of the key wrote exactly these files; who
may sign is decided by the reader's trusted keys. Without those the check finds accidents only:
somebody who changes the files could also sign anew, or take the record away.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfora.files import write_atomically
from fedfora.protection.keys import TRUSTED, key_id, signing_key, trusted_keys, verifies
from fedfora.protection.sealing import SUFFIX

NAME = "provenance.json"
_DOMAIN = b"fedfora provenance 1\n"  # so that this signature means nothing anywhere else
_FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "fedfora.json"),
    *("state.json", "state.safetensors"),
)
PROTECTED = frozenset(_FILES) | {name + SUFFIX for name in _FILES}
"""Files whose content changes what a model says, or what a run resumes from."""


@dataclass(frozen=True)
class Provenance:
    """A checked record: who signed (a key id), and what was stated; digests of files by name."""

    signer: str
    facts: dict[str, Any]
    files: dict[str, str]


def sign_directory(
    directory: Path, facts: dict[str, Any] | None, files: dict[str, str] | None = None
) -> None:
    """Write a signed record of a directory's protected files; nothing if this machine has no key.

    Args:
        directory: With its files complete.
        facts: How they came about; JSON. None signs nothing, see `signed_here`.
        files: Digests that its files had in an earlier record; None takes those they have now.
    """
    path, key = directory / NAME, signing_key()
    if key is None or facts is None:
        path.unlink(missing_ok=True)  # an older record would not fit the files any more
        return
    statement = {"files": _digests(directory) if files is None else files, "facts": facts}
    content = {
        "statement": statement,
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "signature": base64.b64encode(key.sign(_DOMAIN + _canonical(statement))).decode(),
    }
    write_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def verify_directory(directory: Path) -> Provenance | None:
    """Check a directory's record before its files are used; None if it has none and needs none.

    Raises:
        ValueError: If the record is missing though trusted keys are named, is broken, is signed by
            a key that does not count, or does not fit the files.
    """
    trusted, path = trusted_keys(), directory / NAME
    if not path.is_file():
        if trusted is not None:
            raise ValueError(f"{directory} is not signed, and {TRUSTED} asks for a signature")
        return None
    statement, public_key, signature = _read(path)
    if not verifies(public_key, signature, _DOMAIN + _canonical(statement)):
        raise ValueError(f"{path}: the signature does not match this record")
    if trusted is not None and public_key not in trusted:
        raise ValueError(
            f"{path} is signed by key {key_id(public_key)}, which is not among the "
            f"{len(trusted)} of {TRUSTED}"
        )
    _check_files(directory, statement["files"])
    return Provenance(key_id(public_key), statement["facts"], statement["files"])


def signed_files(directory: Path) -> dict[str, str] | None:
    """Check a directory's record and return its files' digests; None if it has and needs none.

    With them `read_bytes` sees to it that what is used is what was signed.

    Raises:
        ValueError: As `verify_directory`.
    """
    found = verify_directory(directory)
    return None if found is None else found.files


def signed_here(directory: Path) -> Provenance | None:
    """Return the record of a directory if it bears this machine's own signature, otherwise None.

    Only such files may be signed again: others would get a signature that they never had.

    Raises:
        ValueError: As `verify_directory`, where this machine has a key.
    """
    if (key := signing_key()) is None or (found := verify_directory(directory)) is None:
        return None
    return found if found.signer == key_id(key.public_key().public_bytes_raw()) else None


def _read(path: Path) -> tuple[dict[str, Any], bytes, bytes]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        statement = content["statement"]
        if not isinstance(statement["files"], dict) or not isinstance(statement["facts"], dict):
            raise TypeError("files and facts must be mappings")
        public_key, signature = (
            base64.b64decode(content[name], validate=True) for name in ("public_key", "signature")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a provenance record: {error}") from error
    return statement, public_key, signature


def _check_files(directory: Path, stated: dict[str, str]) -> None:
    digests = _digests(directory)
    for name in sorted(stated.keys() | digests.keys()):
        if name not in digests:
            raise ValueError(f"{directory / name} is missing, though the signed record names it")
        if name not in stated:
            raise ValueError(f"{directory / name} is not in the signed record")
        if digests[name] != stated[name]:
            raise ValueError(f"{directory / name} is not the file that was signed")


def _digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name in PROTECTED
    }


def _canonical(statement: dict[str, Any]) -> bytes:
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
