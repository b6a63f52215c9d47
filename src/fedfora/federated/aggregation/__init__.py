"""Aggregation: from the sites' adapters to one, as pure functions of named tensors.

Nothing here knows Flower, models or rounds. Arithmetic is in float64, whatever travels; results are
float32. To add a rule, write its function and register one `Rule` beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedfora.federated.aggregation import means, products  # noqa: F401  # fill RULES
from fedfora.federated.aggregation.robust import ROBUST
from fedfora.federated.aggregation.rule import RULES, AdapterState, Rule, Weighted
from fedfora.registry import Registry

__all__ = [
    "NAMES",
    "ROBUST",
    "RULES",
    "AdapterState",
    "Moment",
    "Rule",
    "Weighted",
    "rule_of_round",
    "rules_of",
]


# Which rule each round follows: most names stand for one rule in all rounds, some for several.


@dataclass(frozen=True)
class Moment:
    """Where a federation stands.

    Args:
        round_index: Round, counted from 0.
        warmup_rounds: Rounds before the first change of rule.
        refresh_rounds: Length of a cycle after that.
    """

    round_index: int
    warmup_rounds: int
    refresh_rounds: int


@dataclass(frozen=True)
class Schedule:
    """Which of some rules a round follows."""

    rules: tuple[str, ...]
    at: Callable[[Moment], str]


SCHEDULES: Registry[Schedule] = Registry("aggregation rule")


def warmup_core(moment: Moment) -> str:
    """`refactor` finds the bases A and D; then cores alone travel, until it looks for new ones.

    In the warm-up, and in the first round of each cycle after it, all factors are trained.
    """
    since = moment.round_index - moment.warmup_rounds
    if since < 0 or (since and since % moment.refresh_rounds == 0):
        return "refactor"
    return "core"


SCHEDULES.add("warmup-core", Schedule(("refactor", "core"), warmup_core))

NAMES = sorted([*RULES, *SCHEDULES])


def rule_of_round(name: str, moment: Moment) -> Rule:
    """Return the rule that a round follows.

    Raises:
        ValueError: If the name stands for nothing.
    """
    if name in SCHEDULES:
        return RULES[SCHEDULES[name].at(moment)]
    return RULES[name]


def rules_of(name: str) -> list[Rule]:
    """Return all rules that rounds may follow under a name."""
    if name in SCHEDULES:
        return [RULES[rule] for rule in SCHEDULES[name].rules]
    return [RULES[name]]
