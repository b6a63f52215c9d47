"""The gradients of single examples in a batch, from one backward pass over the batch.

All of a FoRA layer's gradients follow from its input x and the gradient g of its update's output:
with u = h (s K^T), h = A x, update = D u, for each example b (sums run over its tokens)

    dD = g^T u        dK = s (g D)^T h        dA = (g D s K)^T x
    dE = dK           dC = dK B^T             dB = C^T dK            as K = I + E + C B.

So hooks on the modules A and D are enough: the core is folded once for the batch, and yet its
gradient is known for every example. The base, quantized or not, is not involved. The batch's own
gradients, which nobody needs, are not computed: no factor is trainable for autograd meanwhile.

Shape suffixes: B examples, L tokens, I inputs, O outputs, R rank, M inner width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedfora.adapter.layer import ForaLayer


class PerExampleGradients:
    """Collects gradients of shape `(B, ...)` for every trainable factor, while it is entered.

    Raises:
        ValueError: If something other than an adapter's factors is trainable, as its gradients
            would not be seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self.layers = [
            (module, name)
            for module in model.modules()
            if isinstance(module, ForaLayer)
            for name in module.fora_A
            if any(module.factor(letter, name).weight.requires_grad for letter in "ABCDE")
        ]
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._inputs: dict[ForaLayer, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        own = {layer.factor(f, name).weight for layer, name in self.layers for f in "ABCDE"}
        if foreign := sorted(name for p, name in self.names.items() if p not in own):
            raise ValueError(
                f"--privacy_unit record: {foreign[0]} is trained too, but gradients of single "
                "examples are known only for FoRA's factors"
            )

    def __enter__(self) -> "PerExampleGradients":
        for parameter in self.names:
            parameter.requires_grad_(False)
        self._handles.append(self.embeddings.register_forward_hook(_start_graph))
        for layer, name in self.layers:
            A, D = layer.factor("A", name), layer.factor("D", name)
            self._handles.append(A.register_forward_hook(self._after_A(layer)))
            self._handles.append(D.register_forward_hook(self._after_D(layer, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()
        for parameter in self.names:
            parameter.requires_grad_(True)

    def take(self) -> dict[str, Tensor]:
        """Return the gradients of the last backward pass by parameter name, and forget them."""
        taken = {self.names[parameter]: grad for parameter, grad in self._gradients.items()}
        self._gradients = {}
        return taken

    def _after_A(self, layer: ForaLayer) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], h_BLR: Tensor) -> None:
            self._inputs[layer] = (inputs[0].detach(), h_BLR.detach())

        return hook

    def _after_D(self, layer: ForaLayer, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], update_BLO: Tensor) -> None:
            x_BLI, h_BLR = self._inputs.pop(layer)
            if x_BLI.dim() != 3:
                raise ValueError(
                    "--privacy_unit record needs layers that see examples apart, got an input of "
                    f"shape {tuple(x_BLI.shape)}"
                )
            u_BLR = inputs[0].detach()
            if update_BLO.requires_grad:  # not in the first pass of gradient checkpointing
                update_BLO.register_hook(  # type: ignore[no-untyped-call]
                    lambda g: self._collect(layer, name, x_BLI, h_BLR, u_BLR, g)
                )

        return hook

    @torch.no_grad()
    def _collect(
        self,
        layer: ForaLayer,
        name: str,
        x_BLI: Tensor,
        h_BLR: Tensor,
        u_BLR: Tensor,
        g_BLO: Tensor,
    ) -> None:
        A, B, C, D, E = (layer.factor(letter, name) for letter in "ABCDE")
        scaling, dtype = layer.scaling[name], E.weight.dtype
        g_BLO, h_BLR, u_BLR = g_BLO.to(dtype), h_BLR.to(dtype), u_BLR.to(dtype)
        gD_BLR = g_BLO @ D.weight
        if any(factor.weight in self.names for factor in (B, C, E)):
            dK_BRR = scaling * (gD_BLR.mT @ h_BLR)
            self._add(E.weight, dK_BRR)
            self._add(C.weight, dK_BRR @ B.weight.mT)
            self._add(B.weight, C.weight.mT @ dK_BRR)
        if D.weight in self.names:
            self._add(D.weight, g_BLO.mT @ u_BLR)
        if A.weight in self.names:
            gh_BLR = gD_BLR @ (scaling * layer.core(name).mT)
            self._add(A.weight, gh_BLR.mT @ x_BLI.to(dtype))

    def _add(self, parameter: Any, gradient: Tensor) -> None:
        if parameter not in self.names:
            return
        known = self._gradients.get(parameter)
        self._gradients[parameter] = gradient if known is None else known + gradient


def _start_graph(_: nn.Module, __: Any, hidden: Tensor) -> None:
    hidden.requires_grad_()
