"""Several rows in one sequence, without padding and without one row seeing another.

Each row's positions start at 0; from that transformers' masks see where rows begin. `check_no_leak`
makes sure that the model at hand does so, before anything is trained.
"""

from typing import Any

import torch

from fedfora.data.encoding import IGNORED, Encoded

PackedRow = dict[str, list[int]]


def pack(encoded: Encoded, length: int) -> list[PackedRow]:
    """Put rows together so that few sequences of at most `length` tokens hold all of them.

    Longest first, each into the fullest sequence that still has room (best fit decreasing). Rows
    longer than `length` stay alone.

    Args:
        encoded: Rows with `input_ids` and `labels`.
        length: Tokens of a sequence.

    Returns:
        Rows with `input_ids`, `labels` and `position_ids`; the order of what was packed is lost.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"])):
        size = len(encoded[index]["input_ids"])
        fitting = [(left, place) for place, left in enumerate(room) if left >= size]
        if fitting:
            _, place = min(fitting)
            bins[place].append(index)
            room[place] -= size
        else:
            bins.append([index])
            room.append(length - size)
    return [_joined([encoded[i] for i in members]) for members in bins]


def collate_packed(rows: list[PackedRow]) -> dict[str, torch.Tensor]:
    """Return a batch of one sequence: the rows, one after the other."""
    joined = _joined(rows)
    return {name: torch.tensor([values]) for name, values in joined.items()}


@torch.no_grad()
def check_no_leak(model: Any, encoded: Encoded) -> None:
    """Raise if the model's attention reaches over the border between two packed rows.

    Raises:
        ValueError: If a row's logits depend on what stands before it in the sequence.
    """
    shortest = sorted(encoded, key=lambda row: len(row["input_ids"]))[:2]
    first, second = shortest[0], shortest[-1]
    model.eval()
    packed = collate_packed([first, second])
    alone = collate_packed([second])
    batches = [{k: v.to(model.device) for k, v in b.items()} for b in (packed, alone)]
    together, apart = (
        model(input_ids=b["input_ids"], position_ids=b["position_ids"]).logits.float()
        for b in batches
    )
    apart, together = apart[0], together[0, len(first["input_ids"]) :]
    if float((together - apart).abs().max()) > 0.05 * float(apart.std()):
        raise ValueError(
            "--packing: this model's attention sees the rows before in a packed sequence; leave "
            "--packing out (--group_by_length wastes little on padding, too)"
        )


def _joined(rows: list[PackedRow]) -> PackedRow:
    joined: PackedRow = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        size = len(row["input_ids"])
        positions = row.get("position_ids") or list(range(size))
        joined["input_ids"] += row["input_ids"]
        joined["labels"] += [IGNORED, *row["labels"][1:]]  # nothing predicts a row's first token
        joined["position_ids"] += positions
    return joined
