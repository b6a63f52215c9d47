"""Rules in which a part of the adapter never leaves its site: `share-a` and the private core."""

from collections.abc import Iterable

from fedfora.federated.aggregation.means import NOBODY, mean_of_factors
from fedfora.federated.aggregation.rule import RULES, Combine, Rule, check_weight
from fedfora.federated.aggregation.update import AdapterState, Weighted


def leave_as_it_is(
    current: AdapterState, updates: Iterable[Weighted], combine: Combine | None = None
) -> AdapterState:
    """Return the global adapter; the sites sent nothing of theirs.

    Raises:
        ValueError: If no site answered, or a weight is not positive.
    """
    answered = 0
    for _, weight in updates:
        check_weight(weight)
        answered += 1
    if not answered:
        raise ValueError(NOBODY)
    return current


# The last round of `personal-core`: each site fits a core of its own to the finished adapter.
RULES.add("private-core", Rule("private-core", leave_as_it_is, "ADE", returns="", held="AD"))

# FedSA-LoRA (Guo et al. 2024, https://arxiv.org/abs/2410.01463): A learns what is common.
RULES.add("share-a", Rule("share-a", mean_of_factors, travels="A", personal="DE"))
