"""The order of rows by length: rows of like length in a batch, so that little is padded."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class GroupedByLength(Sampler[int]):
    """Rows at random, but batches of like length; the same order for the same seed and epoch.

    transformers' own sampler draws from the global generator, so that a training resumed in a later
    pass over the rows would see another order.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows that should be of like length.
        seed: Seed of the order.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
