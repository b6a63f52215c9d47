"""A base model to a short name for exactly its weights and tokenizer."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedfora.models.loading import Base


def fingerprint(base: Base) -> str:
    """Return a digest of the weights as they lie in memory (quantized ones too) and the tokenizer.

    Two sites with the same fingerprint compute the same function. Take it before an adapter is put
    on the base.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, torch.Tensor):
            with _whole(tensor) as whole:
                raw = whole.detach().to("cpu").contiguous().flatten().view(torch.uint8)
                digest.update(f"{name}:{whole.dtype}:{tuple(whole.shape)}".encode())
                digest.update(raw.numpy().data)
    vocabulary = sorted(base.tokenizer.get_vocab().items())
    digest.update(repr((vocabulary, base.tokenizer.chat_template)).encode())
    return digest.hexdigest()[:16]


def fingerprint_of_rows(encoded: list[dict[str, list[int]]]) -> str:
    """Return a digest of encoded rows, in their order."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _whole(tensor: Any) -> Iterator[Any]:
    """Give a weight that DeepSpeed ZeRO-3 has shared out as a whole, for a moment."""
    if not hasattr(tensor, "ds_id"):
        yield tensor
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(tensor):
        yield tensor
