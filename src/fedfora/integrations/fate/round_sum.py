"""What a party puts into FATE's sum in a round, and what it takes out again.

FATE returns the weighted mean of each array. In core mode that is E = K - I, and since A and D are
everybody's, the mean of the cores is the core of the mean update. With all factors trained, A, D
and E go in, and their mean is not the mean of D K A. How far off it is cannot be seen from means of
factors, but random probes see it: everybody sends D K A X for the same random X, FATE's mean of
these is exact, and

    error = || mean(D K A X) - D' K' A' X || / || mean(D K A X) ||

over all layers, with D', K', A' the averaged factors. The squares of both norms are unbiased
estimates of P times the squared Frobenius norms (Hutchinson).

Shape suffixes: I = inputs, O = outputs, R = rank, P = probes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedfora.adapter.state import AdapterState, layers_of
from fedfora.federated.aggregation.update import part, product
from fedfora.seeds import derive_seed

TRAVELING = {"core": "E", "all": "ADE"}


def train_core_alone(model: nn.Module) -> None:
    """Leave E as the only factor that trains; it reaches every core without B and C."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(".fora_E." in name)


def traveling(folded: AdapterState, trainable: str) -> AdapterState:
    """Return the tensors of a folded adapter that go into the sum, in their order."""
    return dict(sorted(part(folded, TRAVELING[trainable]).items()))


def contribution(
    folded: AdapterState, trainable: str, *, loss: float, num_probes: int, seed: int
) -> list[Tensor]:
    """Return the arrays of one party for one round.

    Args:
        folded: The party's trained adapter.
        trainable: "core" or "all".
        loss: The party's loss in this round.
        num_probes: P; nothing is probed in core mode, where there is no error.
        seed: The round's, the same at every party.
    """
    arrays = list(traveling(folded, trainable).values())
    if trainable == "all" and num_probes:
        arrays += [_probed(folded, layer, num_probes, seed) for layer in layers_of(folded)]
    return [*arrays, torch.tensor([loss])]


def take_out(
    means: list[Any], folded: AdapterState, trainable: str, *, num_probes: int, seed: int
) -> tuple[AdapterState, float, float | None]:
    """Return the averaged adapter in float32, the mean loss, and the aggregation error.

    `means` are what FATE returned for the arrays of `contribution`, which was given the same
    options; `folded` is this party's adapter, for names and shapes and what did not travel.
    """
    tensors = [torch.as_tensor(mean, dtype=torch.float64) for mean in means]
    names = list(traveling(folded, trainable))
    state = folded | dict(zip(names, tensors[: len(names)], strict=True))
    loss, probes = float(tensors[-1]), tensors[len(names) : -1]
    error = None
    if probes:
        shown = [_probed(state, layer, num_probes, seed) for layer in layers_of(folded)]
        missed = sum(float((p - s).square().sum()) for p, s in zip(probes, shown, strict=True))
        norm = sum(float(p.square().sum()) for p in probes)
        error = (missed / norm) ** 0.5 if norm > 0 else 0.0
    return {name: tensor.float() for name, tensor in state.items()}, loss, error


def _probed(folded: AdapterState, layer: str, num_probes: int, seed: int) -> Tensor:
    """Return D K A X (O, P) in float64."""
    DK_OR, A_RI = product(folded, layer)
    generator = torch.Generator().manual_seed(derive_seed(seed, "probe", layer))
    X_IP = torch.randn(A_RI.shape[1], num_probes, generator=generator, dtype=torch.float64)
    return DK_OR @ (A_RI @ X_IP)
