"""Adapters as named tensors: parts of them, and the low-rank product that each layer stands for.

An update maps `<layer>.<factor>` to a tensor. A layer's product is D K A with K = I + E, or with
K = I + E + C B where the inner factors are there; `fold` of `fedfora.adapter` takes them into E.

Shape suffixes: I = inputs, O = outputs, R = rank.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

AdapterState = dict[str, Tensor]
Weighted = tuple[AdapterState, float]
Product = tuple[Tensor, Tensor]

RANK_AXES = {"A": (0,), "B": (1,), "C": (0,), "D": (1,), "E": (0, 1)}  # of each factor


def checked(updates: Iterable[Weighted]) -> Iterator[Weighted]:
    """Yield updates and weights as they arrive.

    Raises:
        ValueError: If there are no updates, or a weight is not positive and finite.
    """
    empty = True
    for update, weight in updates:
        if not 0 < weight < float("inf"):
            raise ValueError(f"a site's weight must be positive and finite, got {weight}")
        empty = False
        yield update, weight
    if empty:
        raise ValueError("nothing to aggregate: no site sent an update")


def layers_of(update: AdapterState) -> list[str]:
    """Return the names of the layers, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in update))


def part(update: AdapterState, factors: str) -> AdapterState:
    """Return the tensors of some factors, e.g. "AD"."""
    return {name: value for name, value in update.items() if name.rpartition(".")[2] in factors}


def product(update: AdapterState, layer: str) -> Product:
    """Return D K (O, R) and A (R, I) of a layer, in float64; without E the core is I."""
    A_RI, D_OR = (update[f"{layer}.{factor}"].double() for factor in "AD")
    DK_OR = D_OR
    if (E_RR := update.get(f"{layer}.E")) is not None:
        DK_OR = DK_OR + D_OR @ E_RR.double()
    if (B_MR := update.get(f"{layer}.B")) is not None:
        DK_OR = DK_OR + D_OR @ (update[f"{layer}.C"].double() @ B_MR.double())
    return DK_OR, A_RI


def absorb(update: AdapterState) -> AdapterState:
    """Return the same adapter with its core taken into D: D' = D K, E' = 0 and no inner factors."""
    absorbed: AdapterState = {}
    for layer in layers_of(update):
        DK_OR, _ = product(update, layer)
        absorbed[f"{layer}.A"] = update[f"{layer}.A"]
        absorbed[f"{layer}.D"] = DK_OR.float()
        absorbed[f"{layer}.E"] = torch.zeros(DK_OR.shape[1], DK_OR.shape[1])
    return absorbed


def rank_of(update: AdapterState) -> int:
    """Return the rank of an adapter whose layers have one; 0 if nothing shows it."""
    name = next(iter(update), None)
    return 0 if name is None else update[name].shape[RANK_AXES[name.rpartition(".")[2]][0]]


def truncate(update: AdapterState, rank: int) -> AdapterState:
    """Return the first `rank` components of an adapter.

    For one whose core is I and whose components are ordered by size, as `refactor` makes it, that
    is the closest adapter of that rank.
    """
    truncated = {}
    for name, value in update.items():
        for axis in RANK_AXES[name.rpartition(".")[2]]:
            value = value.narrow(axis, 0, min(rank, value.shape[axis]))
        truncated[name] = value
    return truncated
