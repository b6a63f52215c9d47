"""A base model to a short name for exactly its weights and tokenizer, and to a rough description.

The fingerprint changes with quantization and number format. The sketch does not: it tells whether
two bases are the same model, however each was loaded.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedfora.models.loading import Base

_OF_ADAPTER = re.compile(r"\.(lora|fora)_\w+\.")
# Of a configuration, what may differ between sites with the same function and the same weights.
_ASIDE = {
    *("transformers_version", "architectures", "auto_map", "dtype", "use_cache"),
    "quantization_config",  # the weights show it
}
SKETCH_NUMBERS = 64
# Rounding to bfloat16 moves a vector by 0.2 % of its norm at most; other models differ by far more.
SKETCH_TOLERANCE = 0.004


def fingerprint(base: Base) -> str:
    """Return a digest of weights as they lie in memory (quantized ones too), and of what uses them.

    That is the configuration, the tokenizer's vocabulary, what it makes of the text of all its
    tokens, and its template. Two sites with the same fingerprint compute the same function, but for
    rules of a tokenizer that concern other text. An adapter on the base does not count.
    """
    digest = hashlib.sha256()
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in base.model.state_dict(keep_vars=True).items()
        if not _OF_ADAPTER.search(name)
    }
    for name, tensor in sorted(weights.items()):
        if isinstance(tensor, torch.Tensor):
            with _whole(tensor) as whole:
                raw = whole.detach().to("cpu").contiguous().flatten().view(torch.uint8)
                digest.update(f"{name}:{whole.dtype}:{tuple(whole.shape)}".encode())
                digest.update(raw.numpy().data)
    vocabulary = sorted(base.tokenizer.get_vocab().items())
    text = " ".join(map(base.tokenizer.decode, sorted(base.tokenizer.get_vocab().values())))
    encoded = base.tokenizer(text, verbose=False)["input_ids"]  # by the merges and the normalizer
    digest.update(repr((vocabulary, encoded, base.tokenizer.chat_template)).encode())
    config = json.dumps(base.model.config.to_diff_dict(), sort_keys=True, default=str)
    told = json.loads(config, object_pairs_hook=lambda kv: [x for x in kv if x[0] not in _ASIDE])
    digest.update(repr(told).encode())
    return digest.hexdigest()[:32]


def describe(base: Base) -> dict[str, Any]:
    """Return what an adapter's record says about the base it was trained on."""
    embedding = base.model.get_input_embeddings().weight
    quantized = getattr(base.model.config, "quantization_config", None)
    return {
        "name": base.name,
        "quantization": base.quantization,
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "double_quant": bool(getattr(quantized, "bnb_4bit_use_double_quant", False)),
        "device": base.model.device.type,
        "sketch": sketch(base),
    }


def sketch(base: Base) -> str:
    """Return numbers from the embedding, which no quantization touches, evenly spread over it."""
    with _whole(base.model.get_input_embeddings().weight) as whole:
        weight = whole.detach().flatten()
        places = torch.linspace(0, len(weight) - 1, SKETCH_NUMBERS, dtype=torch.float64).long()
        numbers = weight[places.to(weight.device)].float().cpu().tolist()
    return " ".join(f"{number:.4g}" for number in numbers)


def same_model(one: str, other: str) -> bool:
    """Return whether two sketches are of the same model, up to the rounding of number formats."""
    a, b = (torch.tensor([float(n) for n in text.split()]) for text in (one, other))
    return len(a) == len(b) and bool((a - b).norm() <= SKETCH_TOLERANCE * max(a.norm(), b.norm()))


def fingerprint_of_rows(encoded: list[dict[str, list[int]]]) -> str:
    """Return a digest of encoded rows, in their order."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _whole(tensor: Any) -> Iterator[Any]:
    """Give a weight that DeepSpeed ZeRO-3 has partitioned as a whole, for a moment."""
    if not hasattr(tensor, "ds_id"):
        yield tensor
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(tensor):
        yield tensor
