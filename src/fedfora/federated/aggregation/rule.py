"""What an aggregation rule is: which factors travel, stay and train, and how many become one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fedfora._torch import Tensor
from fedfora.federated.aggregation.update import AdapterState, Weighted
from fedfora.registry import Registry

__all__ = ["RULES", "AdapterState", "Aggregate", "Combine", "Rule", "Weighted", "checked"]

Combine = Callable[[Tensor, Tensor], Tensor]
"""Rows (K, N) and weights (K,) to one row (N,), as in `fedfora.federated.aggregation.robust`."""

Aggregate = Callable[[AdapterState, Iterable[Weighted], Combine | None], AdapterState]
"""The global adapter, the sites' updates as they come, and what to do instead of the mean."""


@dataclass(frozen=True)
class Rule:
    """One way of federating an adapter, for the length of a round.

    The global adapter has the factors A, D and E = K - I. Every factor either travels
    each round, or is frozen (the same at all sites, sent to each of them once), or is personal
    (never leaves its site), or is absorbed.

    Args:
        name: What the user types.
        aggregate: From the global adapter and what the sites sent to what takes its place; factors
            that do not travel are in neither.
        travels: Factors that go to the sites and come back.
        frozen: Factors that nobody trains.
        personal: Factors that each site trains and keeps.
        absorbs: The core is taken into D before an adapter travels, so that E need not.
        start: How a fresh adapter starts, as `ForaConfig.init_weights`: with D = 0, or with A and D
            from the base weight and K = 0.
        any_rank: Sites may have different ranks.
        keeps_coordinates: Factors mean the same from round to round, so that a server optimizer
            makes sense.
    """

    name: str
    aggregate: Aggregate
    travels: str
    frozen: str = ""
    personal: str = ""
    absorbs: bool = False
    start: Literal["zero", "svd"] = "zero"
    any_rank: bool = False
    keeps_coordinates: bool = True

    @property
    def trains(self) -> str:
        """Factors that a site trains; E stands for the core, whatever holds it."""
        return "".join(factor for factor in "ABCDE" if factor not in self.frozen)


RULES: Registry[Rule] = Registry("aggregation rule")


def checked(updates: Iterable[Weighted]) -> Iterator[Weighted]:
    """Yield updates and weights as they come.

    Raises:
        ValueError: If there is none, or a weight is not positive and finite.
    """
    empty = True
    for update, weight in updates:
        if not 0 < weight < float("inf"):
            raise ValueError(f"a site's weight must be positive and finite, got {weight}")
        empty = False
        yield update, weight
    if empty:
        raise ValueError("nothing to aggregate: no site sent an update")
