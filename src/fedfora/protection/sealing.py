"""Tensors on a disk, encrypted where this machine has a key for it.

A sealed file has `.sealed` behind its name and holds a mark, a fresh random nonce of 12 bytes, and
the safetensors file under AES-256-GCM; the name is authenticated with it, so none can stand in for
one of another name. Who has no key learns the size, nothing else; who changes a bit is noticed.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedfora.files import write_atomically
from fedfora.protection.keys import ENCRYPTION, ENCRYPTION_FILE, encryption_key
from fedfora.registry import need

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".sealed"
_MARK, _NONCE_BYTES = b"FEDFORA1", 12
_AEAD = "cryptography.hazmat.primitives.ciphers.aead"


def seal(content: bytes, key: bytes, name: str) -> bytes:
    """Return `content` encrypted under `key`, bound to `name`."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    encrypted: bytes = need(_AEAD).AESGCM(key).encrypt(nonce, content, _MARK + name.encode())
    return _MARK + nonce + encrypted


def unseal(content: bytes, key: bytes, name: str) -> bytes:
    """Return what `seal` was given.

    Raises:
        ValueError: If the key is another one, or the content or the name is not what was sealed.
    """
    if not content.startswith(_MARK):
        raise ValueError(f"{name} is not a sealed file of fedfora")
    nonce, encrypted = content[len(_MARK) :][:_NONCE_BYTES], content[len(_MARK) + _NONCE_BYTES :]
    try:
        plain: bytes = need(_AEAD).AESGCM(key).decrypt(nonce, encrypted, _MARK + name.encode())
    except (need("cryptography.exceptions").InvalidTag, ValueError) as error:
        raise ValueError(
            f"{name} cannot be opened: another key ({ENCRYPTION_FILE} or {ENCRYPTION}), or the "
            "file was changed"
        ) from error
    return plain


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None
) -> Path:
    """Write a safetensors file, sealed if this machine has a key, and return where it is."""
    from safetensors.torch import save

    content = save({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata)
    return write_bytes(path, content)


def load_tensors(path: Path, signed: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, read by `read_bytes`.

    Raises:
        ValueError: If it is damaged, and as `read_bytes`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(read_bytes(path, signed)))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> Path:
    """Write a file, sealed if this machine has a key, and return where it is.

    It appears whole or not at all; a file that was there in the other form goes.

    Args:
        path: Without `.sealed`.
        content: Of the file.
        durable: Return only when a power cut could not undo it; such a file is its owner's alone.
    """
    sealed_path, key = path.with_name(path.name + SUFFIX), encryption_key()
    target, other = (sealed_path, path) if key else (path, sealed_path)
    content = seal(content, key, path.name) if key else content
    write_atomically(target, content, mode=0o600 if durable else None, durable=durable)
    other.unlink(missing_ok=True)
    return target


def read_bytes(path: Path, signed: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a file, sealed or not.

    Args:
        path: Without `.sealed`.
        signed: SHA-256 of files by name, of which this one must be; None asks for none.

    Raises:
        ValueError: If there is no file, it is not the one that was signed, or it is sealed and this
            machine's key does not open it.
    """
    sealed_path = path.with_name(path.name + SUFFIX)
    if not sealed_path.exists():
        if not path.is_file():
            raise ValueError(f"no such file: {path}")
        return _read_signed(path, signed)
    if path.exists():
        raise ValueError(f"{path} exists both plain and sealed; remove the wrong one")
    key = encryption_key()
    if key is None:
        raise ValueError(
            f"{sealed_path} is encrypted: its key is missing ({ENCRYPTION_FILE} or {ENCRYPTION})"
        )
    return unseal(_read_signed(sealed_path, signed), key, path.name)


def _read_signed(path: Path, signed: Mapping[str, str] | None) -> bytes:
    content = path.read_bytes()
    if signed is not None and hashlib.sha256(content).hexdigest() != signed.get(path.name):
        raise ValueError(f"{path} is not the file that was signed")
    return content


def remove(path: Path) -> None:
    """Remove a file in whichever form it is there."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + SUFFIX).unlink(missing_ok=True)


def is_sealed(path: Path) -> bool:
    """Return whether only the sealed form of a file exists."""
    return path.with_name(path.name + SUFFIX).exists() and not path.exists()
