"""Which rule each round follows: most names stand for one rule in all rounds, some for several."""

from collections.abc import Callable
from dataclasses import dataclass

from fedfora._registry import Registry
from fedfora.federated.aggregation import means, personal, products  # noqa: F401  # fill RULES
from fedfora.federated.aggregation.rule import RULES, Rule


@dataclass(frozen=True)
class Moment:
    """Where a federation stands.

    Args:
        round_index: Round, counted from 0.
        num_rounds: Rounds in all.
        warmup_rounds: Rounds before the first change of rule.
        refresh_rounds: Length of a cycle after that.
    """

    round_index: int
    num_rounds: int
    warmup_rounds: int
    refresh_rounds: int


SCHEDULES: Registry[Callable[[Moment], str]] = Registry("aggregation rule")


@SCHEDULES.register("warmup-core")
def warmup_core(moment: Moment) -> str:
    """`refactor` finds the bases A and D; then cores alone travel, and every so often it does again.

    In the warm-up, and in the first round of each cycle after it, all factors are trained.
    """
    since = moment.round_index - moment.warmup_rounds
    if since < 0 or (since and since % moment.refresh_rounds == 0):
        return "refactor"
    return "core"


NAMES = sorted([*RULES, *SCHEDULES])


def rule_of_round(name: str, moment: Moment) -> Rule:
    """Return the rule that a round follows.

    Raises:
        ValueError: If the name stands for nothing.
    """
    if name in SCHEDULES:
        return RULES[SCHEDULES[name](moment)]
    return RULES[name]
