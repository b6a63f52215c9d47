"""FedProx: a pull towards where a training began, as a callback of the training loop.

    objective = loss + mu / 2 ||w - w_0||^2        over the trained parameters w

Li et al. 2020 (https://arxiv.org/abs/1812.06127, Eq. 2). The term's gradient, mu (w - w_0), is
added before each optimizer step, so it counts once however many batches a step accumulates, and
after the clipping of the loss's own gradient. Reported losses are without the term.
"""

from typing import Any

import torch
from transformers import TrainerCallback


class ProximalTerm(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Adds the gradient of the proximal term.

    Args:
        mu: Its weight, above 0.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self._starts: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def on_train_begin(self, _: Any, __: Any, ___: Any, *, model: Any, **kwargs: Any) -> None:
        """Remember where the parameters begin."""
        trained = (p for p in model.parameters() if p.requires_grad)
        self._starts = [(parameter, parameter.detach().clone()) for parameter in trained]

    @torch.no_grad()
    def on_pre_optimizer_step(self, _: Any, __: Any, ___: Any, **kwargs: Any) -> None:
        """Add mu (w - w_0) to the gradients."""
        for parameter, start in self._starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.mu)
