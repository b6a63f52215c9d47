"""What a training goes on from, on a machine with an encryption key: never plain on a disk.

The optimizer's moments are sums of gradients, and tell of the rows what gradients tell. They are
written as torch writes them, into memory, sealed, and read back by the loader that runs no code.
"""

import io
from pathlib import Path
from typing import Any

import torch

from fedfora.protection.sealing import is_sealed, read_bytes, write_bytes

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


def has_sealed_state(checkpoint: str | Path) -> bool:
    """Tell whether a checkpoint's optimizer is sealed."""
    return is_sealed(Path(checkpoint) / OPTIMIZER)


def save_sealed_state(checkpoint: str | Path, optimizer: Any, scheduler: Any) -> None:
    """Write the states of optimizer and schedule, sealed."""
    for name, owner in ((OPTIMIZER, optimizer), (SCHEDULER, scheduler)):
        buffer = io.BytesIO()
        torch.save(owner.state_dict(), buffer)
        write_bytes(Path(checkpoint) / name, buffer.getvalue())


def load_sealed_state(checkpoint: str | Path, optimizer: Any, scheduler: Any) -> None:
    """Let optimizer and schedule go on from what `save_sealed_state` wrote.

    Raises:
        ValueError: If the key is missing or another one, or a file was changed.
    """
    for name, owner in ((OPTIMIZER, optimizer), (SCHEDULER, scheduler)):
        content = read_bytes(Path(checkpoint) / name)
        owner.load_state_dict(
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        )
