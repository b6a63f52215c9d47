"""Aggregation: from the sites' adapters to one, as pure functions of named tensors.

Nothing here knows Flower, models or rounds. Arithmetic is in float64, whatever travels; results are
float32. To add a rule, write its function and register one `Rule` beside it.
"""

from collections.abc import Callable

from fedfora.federated.aggregation import means, products  # noqa: F401  # fill RULES
from fedfora.federated.aggregation.robust import ROBUST
from fedfora.federated.aggregation.rule import RULES, AdapterState, Rule, Weighted

__all__ = [
    "NAMES",
    "ROBUST",
    "RULES",
    "AdapterState",
    "Rule",
    "Weighted",
    "rule_of_round",
    "rules_of",
]


def warmup_core(round_index: int, warmup_rounds: int, refresh_rounds: int) -> str:
    """`refactor` finds the bases A and D; then cores alone travel, until it looks for new ones.

    In the warm-up, and in the first round of each cycle after it, all factors are trained.
    """
    since = round_index - warmup_rounds
    if since < 0 or (since and since % refresh_rounds == 0):
        return "refactor"
    return "core"


# Names that stand for several rules: which ones, and which of them a round follows.
SCHEDULES: dict[str, tuple[tuple[str, ...], Callable[[int, int, int], str]]] = {
    "warmup-core": (("refactor", "core"), warmup_core),
}

NAMES = sorted([*RULES, *SCHEDULES])


def rule_of_round(name: str, round_index: int, *, warmup_rounds: int, refresh_rounds: int) -> Rule:
    """Return the rule that a round follows.

    Args:
        name: Of a rule, or of a schedule.
        round_index: Round, counted from 0.
        warmup_rounds: Rounds before the first change of rule.
        refresh_rounds: Length of a cycle after that.

    Raises:
        ValueError: If the name stands for nothing.
    """
    if name in SCHEDULES:
        return RULES[SCHEDULES[name][1](round_index, warmup_rounds, refresh_rounds)]
    return RULES[name]


def rules_of(name: str) -> list[Rule]:
    """Return all rules that rounds may follow under a name."""
    return [RULES[rule] for rule in (SCHEDULES[name][0] if name in SCHEDULES else (name,))]
