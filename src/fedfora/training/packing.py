"""Rows to what goes through the model at once: little padding, bounded memory.

A batch is cut into passes of rows of like length; their gradients add up to the batch's. With
`--packing`, what is drawn for a batch are groups of rows with about as many tokens each.
"""

import random
from itertools import accumulate

import torch

from fedfora.data.encoding import IGNORED, Encoded
from fedfora.models.batches import Batch, collate, shared_tokens
from fedfora.models.memory_estimate import MemoryEstimate, estimate_memory
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.registry import counted
from fedfora.training.settings import TrainArguments

# What a forward and backward pass costs whatever its size, as the tokens that cost as much: reading
# and dequantizing weights is worth about 16. Calls and launches (15 ms of a CPU core, 50 ms of a
# GPU) are given as tokens x parameters: few tokens of a large model, many of a small one.
TOKENS_PER_PASS = 16
CALLS_PER_PASS = {"cpu": 2.5e8, "cuda": 2.5e12}
PADDED = 1 / 4  # of a token's cost is attention, where a flat pass has padding, too
MAX_TOKENS = {"cpu": 2048, "cuda": 16384}  # a pass larger than this is no faster
DRAWN_STEPS = 200  # of which the costliest is the estimate


def estimate_step(
    model: ModelArguments, adapter: AdapterArguments, train: TrainArguments, encoded: Encoded
) -> tuple[MemoryEstimate, str]:
    """Return the memory of the costliest pass of many drawn steps on these rows, and its size.

    Raises:
        ValueError: If there is no such model.
    """
    on_gpu = model.device == "cuda" or (model.device == "auto" and torch.cuda.is_available())
    limit = train.max_tokens_per_pass or MAX_TOKENS["cuda" if on_gpu else "cpu"]
    rows = train.rows_per_step
    if train.packing:
        packed = pack(encoded, train.packing_length)
        longest = sorted(packed, key=lambda sequence: sum(map(_length, sequence)))[-rows:]
        largest = _largest_pass([row for sequence in longest for row in sequence], None, limit, 0)
    else:
        largest = _largest_pass(encoded, rows, limit, train.seed)
    estimate = estimate_memory(
        model,
        adapter,
        lengths=largest["attention_mask"].sum(dim=1).tolist(),
        shared=shared_tokens(largest),
        answer_tokens=int((largest["labels"] != IGNORED).sum()),
        optim=train.optim,
        gradient_checkpointing=train.gradient_checkpointing,
        on_gpu=on_gpu,
    )
    at_once = f"up to {num_tokens(largest):,} tokens at once"
    return estimate, f"{counted(rows, 'row')} a step, {at_once}"


def _largest_pass(encoded: Encoded, rows: int | None, limit: int, seed: int) -> Batch:
    """Return the pass with the most tokens of steps of `rows` drawn rows; None for all rows.

    How many parameters the model has is not known yet, so a pass costs what it costs a large one,
    and that it takes flat batches is taken for granted.
    """
    rows = min(rows or len(encoded), len(encoded))
    draw = random.Random(seed)
    largest = collate([max(encoded, key=_length)])  # it has its turn in every epoch
    for _ in range(max(1, min(DRAWN_STEPS, 10**6 // rows**2))):  # cutting takes rows^2
        step = collate(draw.sample(encoded, rows))
        shared = shared_tokens(step)
        passes = passes_of(step, limit, device="cpu", num_parameters=10**12, shared=shared)
        largest = max(largest, *passes, key=num_tokens)
    return largest


def num_tokens(batch: Batch) -> int:
    """Return how many tokens of a flat batch go through the model: what rows share once."""
    mask_BL = batch["attention_mask"]
    return int(mask_BL.sum()) - shared_tokens(batch) * (len(mask_BL) - 1)


def _length(row: dict[str, list[int]]) -> int:
    return len(row["input_ids"])


def passes_of(
    batch: Batch,
    max_tokens: int | None,
    *,
    device: str,
    num_parameters: int,
    shared: int | None = None,
) -> list[Batch]:
    """Cut a batch into passes of rows of like length, the longest rows first.

    The cut is the one with the least work: tokens, and a fixed cost for each pass. Rows stay
    whole: one that is longer than `max_tokens` has a pass of its own.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, padded on the right.
        max_tokens: Tokens of a pass at most; None for what suits the device.
        device: Type of the device.
        num_parameters: Of the model.
        shared: Tokens that all rows begin with and a flat pass computes once; None for passes whose
            padding is computed.
    """
    limit = max_tokens or MAX_TOKENS.get(device, MAX_TOKENS["cuda"])
    calls = CALLS_PER_PASS.get(device, CALLS_PER_PASS["cuda"])
    fixed = TOKENS_PER_PASS + calls / max(1, num_parameters)
    length_B = batch["attention_mask"].sum(dim=1)
    order = length_B.argsort(descending=True, stable=True)
    lengths = length_B[order].tolist()
    return [
        {name: tensor[order[part], : lengths[part.start]] for name, tensor in batch.items()}
        for part in _cut(lengths, limit, fixed, shared)
    ]


def _cut(lengths: list[int], limit: int, fixed: float, shared: int | None) -> list[slice]:
    """Return the parts of descending lengths with the least work, `fixed` for each included."""
    before = [0, *accumulate(lengths)]

    def size(start: int, end: int) -> float:
        rows, longest = end - start, lengths[start]
        if shared is None:
            return rows * longest
        tokens = before[end] - before[start]
        return tokens - (rows - 1) * shared + PADDED * (rows * longest - tokens)

    least, cuts = [0.0], [0]  # for the first n rows: the least work, and where its last pass begins
    for end in range(1, len(lengths) + 1):
        work = {
            start: least[start] + fixed + size(start, end)
            for start in range(end)
            if size(start, end) <= limit or end - start == 1
        }
        cuts.append(min(work, key=work.__getitem__))
        least.append(work[cuts[-1]])
    parts, end = [], len(lengths)
    while end:
        parts.append(slice(cuts[end], end))
        end = cuts[end]
    return parts[::-1]


def pack(encoded: Encoded, length: int) -> list[Encoded]:
    """Put rows together so that few sequences of at most `length` tokens hold all of them.

    Longest first, each into the fullest sequence that still has room (best fit decreasing). Rows
    longer than `length` stay alone.
    """
    sequences: list[Encoded] = []
    room: list[int] = []
    for row in sorted(encoded, key=_length, reverse=True):
        size = _length(row)
        fitting = [(left, place) for place, left in enumerate(room) if left >= size]
        if fitting:
            _, place = min(fitting)
            sequences[place].append(row)
            room[place] -= size
        else:
            sequences.append([row])
            room.append(length - size)
    return sequences


def collate_packed(sequences: list[Encoded]) -> Batch:
    """Return the rows of some packed sequences as one batch."""
    return collate([row for rows in sequences for row in rows])
