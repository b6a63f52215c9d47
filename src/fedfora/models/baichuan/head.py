"""Baichuan2's output layer: raw rows to rows of length one, once.

The published code normalizes the rows of `lm_head` whenever it runs. Here they are normalized when
the model is loaded, because fused losses read `lm_head.weight` and never call the layer.
"""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def normalize_rows(head: nn.Module) -> None:
    """Divide each row of the layer's weight by its length, in place and in the weight's own dtype.

    Args:
        head: The output layer, with or without an adapter on it; an adapter's own weights, trained
            on normalized rows, stay as they are.

    Raises:
        ValueError: If the weight does not lie there as plain numbers, saying why and what helps.
    """
    weight: Any = _base_of(head).weight
    if reason := _obstacle(weight):
        raise ValueError(
            f"the rows of lm_head must be normalized while Baichuan2 is loaded, but {reason}"
        )
    lengths: Tensor = weight.norm(dim=1, keepdim=True)
    weight.div_(lengths.clamp_min(1e-12))


def _base_of(head: Any) -> Any:
    """The layer below PEFT's wrappers."""
    for name in ("original_module", "base_layer"):
        if hasattr(head, name):
            return _base_of(getattr(head, name))
    return head


def _obstacle(weight: Any) -> str | None:
    """Why the rows cannot be normalized, with the remedy; None if they can."""
    if hasattr(weight, "ds_id"):
        return (
            "DeepSpeed ZeRO-3 has partitioned it: use ZeRO-2, or load the model once without "
            "DeepSpeed, save it, and train on what was saved"
        )
    if weight.is_meta:
        return (
            "it is offloaded or was not loaded (meta device): place it on a device, for example "
            "with device_map={'': 0} or device_map='cpu'"
        )
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
        return f"it is a {type(weight).__name__}: leave lm_head out of sharding and quantization"
    if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return (
            f"it is quantized ({weight.dtype}): leave lm_head out, for example with "
            "BitsAndBytesConfig(llm_int8_skip_modules=['lm_head'])"
        )
    return None
