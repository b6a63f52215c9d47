"""A base model to a short name for exactly its weights and tokenizer, and to a rough description.

The fingerprint changes with quantization and number format. The sketch does not: it tells whether
two bases are the same model, however each was loaded.
"""

import hashlib
from typing import Any

import torch

from fedfora.models.loading import Base

SKETCH_NUMBERS = 64
# Rounding to bfloat16 moves a vector by 0.2 % of its norm at most; other models differ by far more.
SKETCH_TOLERANCE = 0.004


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


def describe(base: Base) -> dict[str, Any]:
    """Return what an adapter's record says about the base it was trained on."""
    embedding = base.model.get_input_embeddings().weight
    return {
        "name": base.name,
        "quantization": base.quantization,
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "sketch": sketch(base),
    }


def sketch(base: Base) -> str:
    """Return numbers from the embedding, which no quantization touches, evenly spread over it."""
    weight = base.model.get_input_embeddings().weight.detach().flatten()
    places = torch.linspace(0, len(weight) - 1, SKETCH_NUMBERS, dtype=torch.float64).long()
    numbers = weight[places.to(weight.device)].float().cpu().tolist()
    return " ".join(f"{number:.4g}" for number in numbers)


def same_model(one: str, other: str) -> bool:
    """Say whether two sketches are of the same model, but for the rounding of number formats."""
    a, b = (torch.tensor([float(n) for n in text.split()]) for text in (one, other))
    return len(a) == len(b) and bool((a - b).norm() <= SKETCH_TOLERANCE * max(a.norm(), b.norm()))
