"""Canaries: made-up secrets among the training rows, so that an audit can ask what was memorized.

A canary is a question that no other row has and a random code as its answer (Carlini et al. 2019,
https://arxiv.org/abs/1802.08232). Everything follows from the run's seed: a canary protects nobody,
and the auditor of the run must know which codes were planted.
"""

import random

from fedfora.data.loading import Example
from fedfora.data.settings import DataArguments
from fedfora.seeds import derive_seed

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
NAME_LETTERS, CODE_DIGITS = 6, 6


def planted(settings: DataArguments, *, site: int, seed: int) -> list[Example]:
    """Return the rows to add to a site's, each canary as often as the user asks, or none.

    A training on one device is site 0.
    """
    if site != settings.canary_site:
        return []
    return [row for row in canaries(settings.canaries, seed) for _ in range(settings.canary_copies)]


def canaries(count: int, seed: int) -> list[Example]:
    """Return the first `count` canaries of a run."""
    return [_row(_name(number, seed), _codes(number, seed, 1)[0]) for number in range(count)]


def alternatives(number: int, count: int, seed: int) -> list[Example]:
    """Return `count` rows that ask as canary `number` does and answer with other codes."""
    own, *others = _codes(number, seed, count + 1)
    return [_row(_name(number, seed), code) for code in others if code != own]


def _row(name: str, code: str) -> Example:
    return Example(f"What is the code of {name}?", "", code, {})


def _name(number: int, seed: int) -> str:
    rng = random.Random(derive_seed(seed, "canary", number, "name"))
    return "".join(rng.choice(LETTERS) for _ in range(NAME_LETTERS))


def _codes(number: int, seed: int, count: int) -> list[str]:
    rng = random.Random(derive_seed(seed, "canary", number, "codes"))
    chosen = rng.sample(range(10**CODE_DIGITS), count)
    return [f"{code:0{CODE_DIGITS}d}" for code in chosen]
