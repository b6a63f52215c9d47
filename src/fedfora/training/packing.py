"""Rows to what goes through the model at once: little padding, bounded memory.

A batch is cut into passes of rows of like length; their gradients add up to the batch's.

With `--packing`, several rows share one sequence, without padding and without one row seeing
another. Each row's positions start at 0, which shows transformers' masks where rows begin.
`check_no_leak` makes sure that the model at hand does so, before anything is trained.
"""

import math
import random
from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from fedfora.data.encoding import IGNORED, Encoded
from fedfora.models.memory_estimate import MemoryEstimate, estimate_memory
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.registry import counted
from fedfora.training.settings import TrainArguments

Batch = dict[str, torch.Tensor]

# What a forward and backward pass costs whatever its size, as the tokens that cost as much: reading
# and dequantizing weights is worth about 16. Calls and launches (15 ms of a CPU core, 50 ms of a
# GPU) are given as tokens x parameters: few tokens of a large model, many of a small one.
TOKENS_PER_PASS = 16
CALLS_PER_PASS = {"cpu": 2.5e8, "cuda": 2.5e12}
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
        largest = [{n: values[0].tolist() for n, values in collate_packed(longest).items()}]
    elif train.group_by_length:  # the longest rows share a step
        largest = _largest_pass(sorted(encoded, key=_length)[-rows:], rows, limit, train.seed)
    else:
        largest = _largest_pass(encoded, rows, limit, train.seed)
    tokens = _length(max(largest, key=_length))
    answers = sum(label != IGNORED for row in largest for label in row["labels"])
    estimate = estimate_memory(
        model,
        adapter,
        rows=len(largest),
        tokens=tokens,
        answer_tokens=math.ceil(answers / len(largest)),
        optim=train.optim,
        gradient_checkpointing=train.gradient_checkpointing,
        on_gpu=on_gpu,
    )
    at_once = f"up to {len(largest) * tokens:,} tokens at once"
    return estimate, f"{counted(rows, 'row')} a step, {at_once}"


def _largest_pass(encoded: Encoded, rows: int, limit: int, seed: int) -> Encoded:
    """Return the pass with the most padded tokens of steps of `rows` drawn rows.

    How many parameters the model has is not known yet, so a pass costs what it costs a large one.
    """
    draw, rows = random.Random(seed), min(rows, len(encoded))
    largest: Encoded = [max(encoded, key=_length)]  # it has its turn in every epoch
    for _ in range(max(1, min(DRAWN_STEPS, 10**6 // rows**2))):  # cutting takes rows^2
        step = sorted(draw.sample(encoded, rows), key=_length, reverse=True)
        passes = (step[part] for part in _cut([*map(_length, step)], limit, TOKENS_PER_PASS))
        largest = max(largest, *passes, key=lambda each: len(each) * _length(each[0]))
    return largest


def _length(row: dict[str, list[int]]) -> int:
    return len(row["input_ids"])


def passes_of(
    batch: Batch, max_tokens: int | None, *, device: str, num_parameters: int
) -> list[Batch]:
    """Cut a padded batch into passes of rows of like length, the longest rows first.

    The cut is the one with the least work: padded tokens, and a fixed cost for each pass. Rows stay
    whole: one that is longer than `max_tokens` has a pass of its own.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, padded on the right; without a mask it
            has no padding and is not cut.
        max_tokens: Padded tokens of a pass at most; None for what suits the device.
        device: Type of the device.
        num_parameters: Of the model.
    """
    if "attention_mask" not in batch:
        return [batch]
    limit = max_tokens or MAX_TOKENS.get(device, MAX_TOKENS["cuda"])
    calls = CALLS_PER_PASS.get(device, CALLS_PER_PASS["cuda"])
    fixed = TOKENS_PER_PASS + calls / max(1, num_parameters)
    length_B = batch["attention_mask"].sum(dim=1)
    order = length_B.argsort(descending=True, stable=True)
    lengths = length_B[order].tolist()
    return [
        {name: tensor[order[part], : lengths[part.start]] for name, tensor in batch.items()}
        for part in _cut(lengths, limit, fixed)
    ]


def _cut(lengths: list[int], limit: int, fixed: float) -> list[slice]:
    """Return the parts of descending lengths with the least work, `fixed` for each included."""
    least, cuts = [0.0], [0]  # for the first n rows: the least work, and where its last pass begins
    for end in range(1, len(lengths) + 1):
        work = {
            start: least[start] + fixed + (end - start) * lengths[start]
            for start in range(end)
            if (end - start) * lengths[start] <= limit or end - start == 1
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
    """Return a batch of one sequence: all rows, one after the other, each from position 0."""
    batch: Batch = DataCollatorWithFlattening()([row for rows in sequences for row in rows])
    return batch


@torch.no_grad()
def check_no_leak(model: Any, encoded: Encoded) -> None:
    """Raise if the model's attention reaches over the border between two packed rows.

    Raises:
        ValueError: If a row's logits depend on what stands before it in the sequence.
    """
    shortest = sorted(encoded, key=lambda row: len(row["input_ids"]))[:2]
    first, second = shortest[0], shortest[-1]
    model.eval()

    def logits(*rows: Any) -> Any:  # without a cache, as in training: else borders are ignored
        batch = collate_packed([list(rows)])
        ids, places = (batch[n].to(model.device) for n in ("input_ids", "position_ids"))
        return model(input_ids=ids, position_ids=places, use_cache=False).logits[0].float()

    together, apart = logits(first, second)[len(first["input_ids"]) :], logits(second)
    # Of a token, over its logits: rounding in bfloat16 made up to 0.04, a leak at least 1.3.
    deviation = (together - apart).square().mean(dim=-1).sqrt().max() / apart.std()
    if float(deviation) > 0.2:
        raise ValueError(
            "--packing: this model's attention sees earlier rows of a packed sequence; leave "
            "--packing out (--group_by_length also wastes little on padding)"
        )
