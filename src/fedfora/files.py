"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomically(
    path: Path, content: bytes | str, *, mode: int | None = None, durable: bool = False
) -> None:
    """Write a file under a temporary name, then rename it into place.

    Args:
        path: The file.
        content: Text is written as UTF-8.
        mode: Its permissions, from the first byte on; None leaves them to the process's umask.
        durable: Return only once a power cut could not undo it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # its permissions might differ, or it may be a link
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(content.encode() if isinstance(content, str) else content)
    if durable:
        sync(temporary)
    temporary.replace(path)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until what was written to a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
