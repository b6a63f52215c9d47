"""Several adapters to one whose update is their weighted sum."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedfora.adapter.layer import ForaLayer
from fedfora.lowrank import best_factors

TYPES = ("cat", "svd")


def add_weighted_adapter(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    *,
    combination_type: str,
    rank: int | None,
) -> None:
    """Add `sum_i w_i s_i D_i K_i A_i` to a `ForaModel` as adapter `adapter_name`.

    The sum is a product of stacked factors, [w_1 s_1 D_1 K_1, ...] [A_1; ...]. "cat" keeps them as
    D and A, "svd" takes the closest factors of a lower rank; both have K = I and scaling 1.

    Raises:
        ValueError: If an adapter is unknown, the counts differ, or the type has no meaning.
    """
    _check(tuner, adapters, weights, adapter_name, combination_type)
    stacked = {
        key: _stack(layer, adapters, weights)
        for key, layer in tuner.model.named_modules()
        if isinstance(layer, ForaLayer) and set(adapters) & set(layer.fora_A)
    }
    ranks = {
        key: len(Q_SI) if combination_type == "cat" else rank or _largest_rank(tuner, key, adapters)
        for key, (_, Q_SI) in stacked.items()
    }
    common = max(ranks.values())
    pattern = {key: r for key, r in ranks.items() if r != common}
    tuner.peft_config[adapter_name] = replace(
        tuner.peft_config[adapters[0]],
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        target_modules=set(stacked),
        layers_to_transform=None,
        layers_pattern=None,
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    for key, (P_OS, Q_SI) in stacked.items():
        factors = (P_OS, Q_SI)
        if combination_type == "svd":
            factors = best_factors(P_OS, Q_SI, ranks[key])
        _write(tuner.model.get_submodule(key), adapter_name, *factors)
    tuner.set_adapter(tuner.active_adapters)


def _stack(
    layer: ForaLayer, adapters: Sequence[str], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return [w_1 s_1 D_1 K_1, ...] (O, S) and [A_1; ...] (S, I) of a layer, in float64."""
    left, right = [], []
    for name, weight in zip(adapters, weights, strict=True):
        if name in layer.fora_A:
            A_RI, D_OR = (layer.factor(f, name).weight.detach().double() for f in "AD")
            core_RR = layer.core(name).detach().mT.double()
            left.append(weight * layer.scaling[name] * (D_OR @ core_RR))
            right.append(A_RI)
    return torch.cat(left, dim=1), torch.cat(right, dim=0)


@torch.no_grad()
def _write(layer: Any, name: str, D_OR: Tensor, A_RI: Tensor) -> None:
    layer.factor("D", name).weight.copy_(D_OR)
    layer.factor("A", name).weight.copy_(A_RI)
    for letter in "BE":
        layer.factor(letter, name).weight.zero_()


def _largest_rank(tuner: Any, key: str, adapters: Sequence[str]) -> int:
    layer: ForaLayer = tuner.model.get_submodule(key)
    return max(layer.r[name] for name in adapters if name in layer.r)


def _check(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    if combination_type not in TYPES:
        raise ValueError(
            f"combination_type {combination_type!r} has no meaning for FoRA: averaging factors is "
            f"not averaging updates (known: {', '.join(TYPES)})"
        )
    if unknown := [name for name in adapters if name not in tuner.peft_config]:
        raise ValueError(f"no adapter called {unknown[0]!r} (there are: {list(tuner.peft_config)})")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"there is an adapter called {adapter_name!r} already")
