"""Gradient inversion: reading a row's answer from one update, with and without protection.

The attacker is strong: it knows base, adapter, the row's prompt and how long the answer is, and for
every hidden token a short list that holds the right one. It goes through the hidden tokens again
and again and puts in each place the token of the list whose gradient points most nearly in the
direction of the update it saw (matching gradients as Zhu et al. 2019,
https://arxiv.org/abs/1906.08935, by their cosine as Geiping et al. 2020,
https://arxiv.org/abs/2003.14053; over tokens instead of numbers). The update is the gradient
itself, as the change of one step of gradient descent is.

Shape suffixes: B rows, N numbers of the adapter, V tokens of a list.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from fedfora.adapter.per_example import PerExampleGradients
from fedfora.data.encoding import IGNORED, Encoded
from fedfora.models.losses import row_losses
from fedfora.privacy.clipping import SecretNoise, shrink_factor

SWEEPS = 4  # through the hidden tokens, at most; it ends where nothing changes any more
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Protection:
    """What stands between a row's gradient and the attacker.

    Args:
        name: As the table has it.
        others: Further rows whose gradients are in the same sum: of a larger batch, or of the other
            sites under secure aggregation.
        noise_multiplier: Noise over clipping norm on that sum; 0 for neither noise nor clipping.
    """

    name: str
    others: int = 0
    noise_multiplier: float = 0.0


@dataclass(frozen=True)
class Recovered:
    """What an attack found.

    Args:
        protection: Against what.
        tokens: Hidden tokens of all rows attacked.
        found: How many of them it got right.
        chance: Share that guessing gets right.
    """

    protection: str
    tokens: int
    found: int
    chance: float


class Inversion:
    """An attack on the updates of single rows.

    Args:
        model: With an adapter whose factors are trainable; its gradients are cleared.
        tokenizer: The base's.
        num_tokens: Answer tokens to hide, at most, from the first on.
        num_choices: Tokens in each list, the right one among them.
        batch_size: Rows per pass.
        seed: Draws lists and rows.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        num_tokens: int,
        num_choices: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """Keep what all attacks have in common."""
        self.model = model
        self.num_tokens = num_tokens
        self.num_choices = min(num_choices, len(tokenizer))
        self.batch_size = batch_size
        self.seed = seed
        self.vocabulary = range(len(tokenizer))
        self._collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def attack(self, rows: Encoded, others: Encoded, protection: Protection) -> Recovered:
        """Attack the update of each of `rows`.

        Args:
            rows: Whose answers are looked for.
            others: The rows that share the sum, where some do; at least as many as it asks for.
            protection: What the updates go through.
        """
        tokens = recovered = 0
        for index, row in enumerate(rows):
            rng = random.Random(self.seed + index)
            hidden = hidden_places(row)[: self.num_tokens]
            update_N = self.update(row, others[: protection.others], protection.noise_multiplier)
            guess = self.guess(row, hidden, update_N, rng)
            tokens += len(hidden)
            recovered += sum(guess[place] == row["input_ids"][place] for place in hidden)
        return Recovered(protection.name, tokens, recovered, 1 / self.num_choices)

    def update(self, row: Row, others: Sequence[Row], noise_multiplier: float) -> Tensor:
        """Return what the attacker sees, of shape `(N,)`."""
        grads_BN = self._gradients([row, *others])
        if not noise_multiplier:
            return grads_BN.sum(0)
        clipped_BN = grads_BN * shrink_factor(grads_BN.norm(dim=1), 1.0)[:, None]
        summed_N = clipped_BN.sum(0)
        return summed_N + SecretNoise().normal(summed_N.shape, noise_multiplier)

    def guess(
        self, row: Row, hidden: Sequence[int], update_N: Tensor, rng: random.Random
    ) -> list[int]:
        """Return the row's tokens as the attacker thinks they are.

        Args:
            row: The row; what it holds at `hidden` is used for nothing but the lists.
            hidden: Places of the hidden tokens.
            update_N: What the attacker sees.
            rng: Draws the lists and the first guess.
        """
        lists = {place: self._choices(row["input_ids"][place], rng) for place in hidden}
        known = list(row["input_ids"])
        for place in hidden:
            known[place] = rng.choice(lists[place])
        for _ in range(SWEEPS):
            before = list(known)
            for place in hidden:
                candidates_V = [_with(row, known, place, token) for token in lists[place]]
                grads_VN = self._gradients(candidates_V)
                likeness_V = torch.cosine_similarity(grads_VN, update_N[None], dim=1)
                known[place] = lists[place][int(likeness_V.argmax())]
            if known == before:
                break
        return known

    def _choices(self, right: int, rng: random.Random) -> list[int]:
        wrong = [token for token in self.vocabulary if token != right]
        return sorted([right, *rng.sample(wrong, self.num_choices - 1)])

    def _gradients(self, rows: Sequence[Row]) -> Tensor:
        """Return the rows' gradients of shape `(B, N)`."""
        found = []
        for first in range(0, len(rows), self.batch_size):
            batch = self._collate([dict(row) for row in rows[first : first + self.batch_size]])
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            with PerExampleGradients(self.model) as collector:
                row_losses(self.model, batch).sum().backward()  # type: ignore[no-untyped-call]
                gradients = collector.take()
            self.model.zero_grad()
            found.append(torch.cat([g.flatten(1).float().cpu() for g in gradients.values()], dim=1))
        return torch.cat(found)


def hidden_places(row: Row) -> list[int]:
    """Return the places of a row's answer tokens, but for the end of the sequence."""
    return [place for place, label in enumerate(row["labels"]) if label != IGNORED][:-1]


def _with(row: Row, known: list[int], place: int, token: int) -> Row:
    ids = [*known[:place], token, *known[place + 1 :]]
    labels = [
        IGNORED if label == IGNORED else new for label, new in zip(row["labels"], ids, strict=True)
    ]
    return {"input_ids": ids, "labels": labels}
