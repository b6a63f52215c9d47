"""Before the first round: the same seed, the same meaning of every number, the same start.

FATE sums tensors by their position and trusts that all parties mean the same; nothing is compared
and every party draws its own first adapter. So the guest gives out the seed, each host describes
what it made of it, and the guest compares and sends the start. The arbiter sees none of this.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedfora.adapter.state import AdapterState


@dataclass(frozen=True)
class Card:
    """What must be the same at every party.

    Args:
        layout: Digest of names and shapes of the tensors that travel, in their order.
        base_fingerprint: Of the base model's weights and tokenizer.
        prompts: The prompt format.
        num_rounds: Rounds.
        local_steps: Optimizer steps of a round.
        trainable: "core" or "all".
        warmup_rounds: Rounds in which all factors are trained before the core alone.
        error_probes: Probes of the error meter.
    """

    layout: str
    base_fingerprint: str
    prompts: str
    num_rounds: int
    local_steps: int
    trainable: str
    warmup_rounds: int
    error_probes: int


def layout_digest(state: AdapterState) -> str:
    """Return a short digest that differs for other names, shapes or another order."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def share_seed(ctx: Any, seed: int) -> int:
    """Return the guest's seed at every client.

    Args:
        ctx: FATE's context of a guest or host.
        seed: This party's own, which counts at the guest only.
    """
    if ctx.is_on_guest:
        ctx.hosts.put("fedfora_seed", seed)
        return seed
    return int(ctx.guest.get("fedfora_seed"))


def agree(ctx: Any, card: Card, num_rows: int) -> float:
    """Compare the cards of all clients and return this one's share of all rows.

    Args:
        ctx: FATE's context of a guest or host.
        card: This party's.
        num_rows: Rows it trains on.

    Raises:
        ValueError: At every client, if two cards differ; names the party and the values.
    """
    if ctx.is_on_guest:
        answers = ctx.hosts.get("fedfora_card")
        names = [f"{host.role}:{host.party_id}" for host in ctx.hosts]
        problem = _difference(card, dict(zip(names, answers, strict=True)))
        total = num_rows + sum(answer["num_rows"] for answer in answers)
        verdict = {"problem": problem, "num_rows": total}
        ctx.hosts.put("fedfora_verdict", verdict)
    else:
        ctx.guest.put("fedfora_card", {"num_rows": num_rows, **asdict(card)})
        verdict = ctx.guest.get("fedfora_verdict")
    if verdict["problem"]:
        raise ValueError(verdict["problem"])
    return num_rows / float(verdict["num_rows"])


def share_start(ctx: Any, folded: AdapterState) -> AdapterState:
    """Return the guest's first adapter at every client."""
    if ctx.is_on_guest:
        ctx.hosts.put("fedfora_start", [tensor.numpy() for tensor in folded.values()])
        return folded
    arrays = ctx.guest.get("fedfora_start")
    return {
        name: torch.from_numpy(array.copy()) for name, array in zip(folded, arrays, strict=True)
    }


def _difference(card: Card, answers: dict[str, dict[str, Any]]) -> str:
    for field, mine in asdict(card).items():
        for name, answer in answers.items():
            if answer[field] != mine:
                return (
                    f"the parties differ in {field}: the guest has {mine}, {name} has "
                    f"{answer[field]}"
                )
    return ""
