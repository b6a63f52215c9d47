"""The keys of this machine: named by environment variables, made by `fedfora keys`.

Keys belong to a machine, not to a run: a flag would appear in config.yaml, the process list, and
in the settings that a coordinator sends to its sites. So there are no flags, only

- `FEDFORA_SIGNING_KEY`: file with the Ed25519 key that signs what this machine writes;
- `FEDFORA_TRUSTED_KEYS`: file with the public keys whose signatures count here; with it, nothing
  unsigned is loaded;
- `FEDFORA_ENCRYPTION_KEY_FILE`, or the key itself in `FEDFORA_ENCRYPTION_KEY`: what adapters and
  checkpoints are encrypted with on the disk.
"""

import base64
import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

from fedfora.registry import need

SIGNING, TRUSTED = "FEDFORA_SIGNING_KEY", "FEDFORA_TRUSTED_KEYS"
ENCRYPTION, ENCRYPTION_FILE = "FEDFORA_ENCRYPTION_KEY", "FEDFORA_ENCRYPTION_KEY_FILE"
ENCRYPTION_BYTES = 32

_ED25519 = "cryptography.hazmat.primitives.asymmetric.ed25519"
_SERIALIZATION = "cryptography.hazmat.primitives.serialization"


def signing_key() -> Any | None:
    """Return this machine's Ed25519 private key; None where it signs nothing.

    Raises:
        ValueError: If the file cannot be read or holds no such key.
    """
    path = os.environ.get(SIGNING)
    return read_signing_key(Path(path)) if path else None


def trusted_keys() -> set[bytes] | None:
    """Return the raw public keys that count here, from a file of PEM blocks; None where any does.

    Raises:
        ValueError: If the file cannot be read or a block is no Ed25519 public key.
    """
    path = os.environ.get(TRUSTED)
    if not path:
        return None
    end = "-----END PUBLIC KEY-----"
    blocks = [part + end for part in _read(Path(path), TRUSTED).split(end)[:-1]]
    if not blocks:
        raise ValueError(f"{TRUSTED} {path}: not a PEM public key")
    keys = set()
    for block in blocks:
        try:
            key = need(_SERIALIZATION).load_pem_public_key(block.strip().encode())
        except ValueError as error:
            raise ValueError(f"{TRUSTED} {path}: not a PEM public key: {error}") from error
        if not isinstance(key, need(_ED25519).Ed25519PublicKey):
            raise ValueError(f"{TRUSTED} {path}: {type(key).__name__} is not an Ed25519 key")
        keys.add(key.public_bytes_raw())
    return keys


def encryption_key() -> bytes | None:
    """Return the 32 bytes that files are encrypted with; None where they are not.

    Raises:
        ValueError: If both variables are set, or what they name is not a key.
    """
    value, path = os.environ.get(ENCRYPTION), os.environ.get(ENCRYPTION_FILE)
    if value and path:
        raise ValueError(f"{ENCRYPTION} and {ENCRYPTION_FILE} are both set; one of them is enough")
    if path:
        return _decoded(_read(Path(path), ENCRYPTION_FILE), f"{ENCRYPTION_FILE} {path}")
    return _decoded(value, ENCRYPTION) if value else None


def read_signing_key(path: Path) -> Any:
    """Return the Ed25519 private key in a PEM file (PKCS #8, as openssl writes it too).

    Raises:
        ValueError: If the file cannot be read or holds no such key.
    """
    text = _read(path, SIGNING)
    try:
        key = need(_SERIALIZATION).load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{SIGNING} {path}: not a PEM private key: {error}") from error
    if not isinstance(key, need(_ED25519).Ed25519PrivateKey):
        raise ValueError(f"{SIGNING} {path}: {type(key).__name__} is not an Ed25519 key")
    return key


def make_signing_key(path: Path) -> str:
    """Write a new private key to `path`, its public half to `path`.pub, and return its id.

    Raises:
        ValueError: If there is a file already: a lost key cannot be made again.
    """
    serialization = need(_SERIALIZATION)
    key = need(_ED25519).Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes_raw()
    _write_secret(path, private)
    path.with_name(path.name + ".pub").write_bytes(public_pem(public))
    return key_id(public)


def public_pem(public: bytes) -> bytes:
    """Return an Ed25519 public key of 32 bytes as PEM."""
    serialization = need(_SERIALIZATION)
    key = need(_ED25519).Ed25519PublicKey.from_public_bytes(public)
    written: bytes = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return written


def verifies(public: bytes, signature: bytes, content: bytes) -> bool:
    """Return whether the holder of an Ed25519 key of 32 bytes signed some content."""
    try:
        key = need(_ED25519).Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, content)
    except (need("cryptography.exceptions").InvalidSignature, ValueError):
        return False
    return True


def make_encryption_key(path: Path) -> None:
    """Write a new key for files.

    Raises:
        ValueError: If there is a file already: what it encrypted could not be read any more.
    """
    _write_secret(path, base64.b64encode(secrets.token_bytes(ENCRYPTION_BYTES)) + b"\n")


def key_id(public_key: bytes) -> str:
    """Return the short name of a public key: the start of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def _write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, never over another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ValueError(f"{path} exists; keys are never overwritten") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _read(path: Path, variable: str) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{variable} {path} cannot be read: {error}") from error


def _decoded(text: str, where: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except ValueError as error:
        raise ValueError(f"{where}: not a base64 key") from error
    if len(key) != ENCRYPTION_BYTES:
        raise ValueError(f"{where}: a key has {ENCRYPTION_BYTES} bytes, this one {len(key)}")
    return key
