"""Adapter weights as named tensors: read, folded for travel, and put back.

A folded adapter holds A, D and E' = K - I for each layer, with B' = 0. It is the same function as
the five factors, in the bytes of LoRA plus R x R. C is not sent: the receiver draws it from the
run's seed and the layer's name, so every participant has the same one.

LoRA's two factors are A and D here; its core is I and nowhere written.

Names are `<layer>.<factor>`, e.g. `model.layers.0.self_attn.q_proj.A`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedfora.adapter.config import default_inner_dim
from fedfora.adapter.layer import ForaLayer
from fedfora.seeds import derive_seed

FACTORS = ("A", "B", "C", "D", "E")
TRAVELING = ("A", "D", "E")

PREFIX = "base_model.model."  # PEFT's, before the names of the base's modules

AdapterState = dict[str, Tensor]


def peft_key(name: str, kind: str = "fora") -> str:
    """Return what PEFT's files call the factor `<layer>.<factor>`."""
    layer, factor = name.rsplit(".", 1)
    return f"{PREFIX}{layer}.{kind}_{factor}.weight"


def from_peft_key(key: str, kind: str = "fora") -> str | None:
    """Return `<layer>.<factor>` for a name in PEFT's files; None if it is not a factor."""
    layer, middle, factor = key.removeprefix(PREFIX).rpartition(f".{kind}_")
    return f"{layer}.{factor.removesuffix('.weight')}" if middle else None


def read_state(model: nn.Module, adapter_name: str = "default") -> AdapterState:
    """Return copies of all factors of every adapted layer, in float32, on the CPU."""
    return {
        f"{layer}.{factor}": weight.detach().to("cpu", torch.float32, copy=True)
        for layer, factor, weight in _weights(model, adapter_name)
    }


def state_from_dict(weights: Mapping[str, Tensor], adapter_name: str = "default") -> AdapterState:
    """Return an adapter's factors from the state dict of the whole model, in float32, on the CPU.

    If a process has no part of a gathered state dict, the result is empty.
    """
    state = {}
    for key, weight in weights.items():
        name = from_peft_key(key.replace(f".{adapter_name}.weight", ".weight"))
        if name is not None and key.endswith(f".{adapter_name}.weight"):
            state[name] = weight.detach().to("cpu", torch.float32, copy=True)
    return state


@torch.no_grad()
def write_state(model: nn.Module, state: AdapterState, adapter_name: str = "default") -> None:
    """Overwrite the factors of an adapter.

    Raises:
        ValueError: If names or shapes differ from the adapter's.
    """
    weights = {f"{layer}.{factor}": w for layer, factor, w in _weights(model, adapter_name)}
    check_same_layout(state, weights)
    for name, weight in weights.items():
        weight.copy_(state[name])


def fold(state: AdapterState) -> AdapterState:
    """Return A, D and E' = E + C B for every layer, the form in which adapters travel."""
    folded: AdapterState = {}
    for layer in layers_of(state):
        folded |= {name: state[name].clone() for name in (f"{layer}.A", f"{layer}.D")}
        if f"{layer}.B" in state:  # not of LoRA
            B_MR, C_RM, E_RR = (state[f"{layer}.{factor}"] for factor in ("B", "C", "E"))
            folded[f"{layer}.E"] = E_RR + C_RM @ B_MR
    return folded


def unfold(folded: AdapterState, *, seed: int, inner_dim: int | None = None) -> AdapterState:
    """Return five factors with the folded adapter's function: B = 0, and C drawn from the seed.

    `inner_dim` is the width M as in `ForaConfig`.
    """
    state = {}
    for layer in layers_of(folded):
        rank, width = folded[f"{layer}.A"].shape
        M = inner_dim or default_inner_dim(width)
        state[f"{layer}.A"] = folded[f"{layer}.A"]
        state[f"{layer}.B"] = torch.zeros(M, rank)
        state[f"{layer}.C"] = _draw_C(seed, layer, rank, M)
        state[f"{layer}.D"] = folded[f"{layer}.D"]
        state[f"{layer}.E"] = folded.get(f"{layer}.E", torch.zeros(rank, rank))
    return state


def set_trainable(model: nn.Module, factors: str, adapter_name: str = "default") -> None:
    """Make only some factors of an adapter trainable; E stands for the core: B, C and E."""
    trained = factors + "BC" if "E" in factors else factors
    for _, factor, weight in _weights(model, adapter_name):
        weight.requires_grad_(factor in trained)


@torch.no_grad()
def draw_inner_factors(model: nn.Module, seed: int, adapter_name: str = "default") -> None:
    """Give a fresh adapter the C that `unfold` would give it."""
    for layer, factor, weight in _weights(model, adapter_name):
        if factor == "C":
            weight.copy_(_draw_C(seed, layer, *weight.shape))


def layers_of(state: AdapterState) -> list[str]:
    """Return the names of the adapted layers, in order."""
    return [name.removesuffix(".A") for name in state if name.endswith(".A")]


def check_same_layout(state: AdapterState, reference: dict[str, Any]) -> None:
    """Raise if `state` does not have exactly the names and shapes of `reference`.

    Raises:
        ValueError: Naming the first difference.
    """
    if differing := sorted(state.keys() ^ reference.keys()):
        where = "missing" if differing[0] in reference else "unknown"
        raise ValueError(f"adapter weights do not fit: {differing[0]} is {where}")
    for name, weight in reference.items():
        if state[name].shape != weight.shape:
            raise ValueError(
                f"adapter weights do not fit: {name} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(weight.shape)}"
            )


def _draw_C(seed: int, layer: str, rank: int, inner_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "C", layer))
    C_RM = torch.empty(rank, inner_dim)
    nn.init.kaiming_uniform_(C_RM, a=math.sqrt(5), generator=generator)
    return C_RM


def _weights(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, Tensor]]:
    for path, module in model.named_modules():
        layer = path.removeprefix(PREFIX)
        if isinstance(module, ForaLayer) and adapter_name in module.fora_A:
            for factor in FACTORS:
                yield layer, factor, module.factor(factor, adapter_name).weight
        elif isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            yield layer, "A", module.lora_A[adapter_name].weight
            yield layer, "D", module.lora_B[adapter_name].weight
