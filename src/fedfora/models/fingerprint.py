"""A base model to a short name for exactly its weights and tokenizer."""

import hashlib

import torch

from fedfora.models.loading import Base


def fingerprint(base: Base) -> str:
    """Return a digest of the weights as they lie in memory (quantized ones too) and the tokenizer.

    Two sites with the same fingerprint compute the same function. Take it before an adapter is put
    on the base.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            raw = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(raw.numpy().data)
    vocabulary = sorted(base.tokenizer.get_vocab().items())
    digest.update(repr((vocabulary, base.tokenizer.chat_template)).encode())
    return digest.hexdigest()[:16]
