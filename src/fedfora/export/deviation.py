"""How far two models' answers are apart, on fixed random tokens: the check after every export."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS, LENGTH, SEED = 4, 32, 0


@dataclass(frozen=True)
class Deviation:
    """Distance between the logits of two models.

    Args:
        largest: Largest absolute difference, divided by the largest absolute logit.
        same_token: Share of positions at which both find the same next token likeliest.
    """

    largest: float
    same_token: float

    def __str__(self) -> str:
        """Return the deviation as a person reads it."""
        return f"largest deviation {self.largest:.1e}, same next token {self.same_token:.1%}"


def probe(vocab_size: int) -> Tensor:
    """Return the token ids that both models read, of shape `(ROWS, LENGTH)`."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocab_size, (ROWS, LENGTH), generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return a model's logits on the probe, in float32 on the CPU."""
    model.eval()
    ids = probe(model.config.get_text_config().vocab_size).to(model.device)
    result: Tensor = model(input_ids=ids).logits
    return result.float().cpu()


def deviation(expected: Tensor, actual: Tensor) -> Deviation:
    """Return the deviation of `actual` logits from `expected` ones."""
    largest = (expected - actual).abs().max() / expected.abs().max()
    same = (expected.argmax(-1) == actual.argmax(-1)).float().mean()
    return Deviation(float(largest), float(same))
