"""LoRA+ for FoRA: the factor nearest the output learns faster than the others."""

from typing import Any

from torch import nn


def loraplus_groups(
    model: nn.Module, *, learning_rate: float, ratio: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return optimizer parameter groups: D at `ratio * learning_rate`, all else at `learning_rate`.

    LoRA's B starts at zero and stands at the output; LoRA+ (Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354) lets it learn faster than A. In FoRA that factor is D. PEFT's
    own `create_loraplus_optimizer` looks for `lora_B`, finds none and changes nothing.

    Args:
        model: A model with trainable FoRA factors.
        learning_rate: Rate of A, B, C, E and whatever else trains, e.g. saved modules.
        ratio: Factor for D, at least 1; the paper finds about 16 good.
        weight_decay: For all groups.

    Raises:
        ValueError: If the ratio is below 1, or no factor D trains.
    """
    if ratio < 1:
        raise ValueError(f"the LoRA+ ratio must be at least 1, got {ratio}")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fast = [p for n, p in trained.items() if ".fora_D." in n]
    slow = [p for n, p in trained.items() if ".fora_D." not in n]
    if not fast:
        raise ValueError("LoRA+ speeds up factor D, but none is trained here")
    groups = [
        {"params": slow, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": fast, "lr": learning_rate * ratio, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
