"""Aggregation: from the sites' adapters to one, as pure functions of named tensors.

Here is the table of rules: which factors travel, stay and train, and what the mean is taken of.
It needs no PyTorch, which only `Rule.aggregate` imports. Nothing in this package knows Flower,
models or rounds. Arithmetic is in float64, whatever travels; results are float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedfora.federated.aggregation.robust import ROBUST, Combine
from fedfora.registry import Registry

if TYPE_CHECKING:
    from fedfora.federated.aggregation.update import AdapterState, Weighted

__all__ = ["ROBUST", "RULES", "Combine", "Rule"]


@dataclass(frozen=True)
class Rule:
    """One way of federating an adapter.

    The global adapter has the factors A, D and E = K - I. Every factor either travels each round,
    or is frozen (the same at all sites, sent to each of them once), or is absorbed.

    Args:
        name: What the user types.
        travels: Factors that go to the sites and come back.
        frozen: Factors that nobody trains.
        absorbs: The core is folded into D before an adapter travels, so that E need not.
        start: How a fresh adapter starts, as `ForaConfig.init_weights`: with D = 0, or with A and D
            from the base weight and K = 0.
        mean_of: "factors" averages each factor that travels. "products" averages what the layers
            do, D K A, and makes new factors each round: sites may have different ranks, and no
            server optimizer or error feedback can continue from the factors of the round before.
    """

    name: str
    travels: str
    frozen: str = ""
    absorbs: bool = False
    start: Literal["zero", "svd"] = "zero"
    mean_of: Literal["factors", "products"] = "factors"

    @property
    def trains(self) -> str:
        """Factors that a site trains; E stands for the core, whatever holds it."""
        return "".join(factor for factor in "ABCDE" if factor not in self.frozen)

    def aggregate(
        self, current: AdapterState, updates: Iterable[Weighted], combine: Combine | None = None
    ) -> AdapterState:
        """Return what replaces the factors that travel; arguments as for `mean_of_factors`.

        Raises:
            ValueError: If there is no update, or a weight is not positive.
        """
        from fedfora.federated.aggregation.means import mean_of_factors, refactor

        mean = refactor if self.mean_of == "products" else mean_of_factors
        return mean(current, updates, combine)


RULES: Registry[Rule] = Registry("aggregation rule")

for _rule in (
    Rule("fedavg", travels="ADE"),
    Rule("refactor", travels="AD", absorbs=True, mean_of="products"),
    # FFA-LoRA (Sun et al. 2024, https://arxiv.org/abs/2403.12313); D absorbs FoRA's core.
    Rule("ffa", travels="D", frozen="A", absorbs=True),
    # LoRA-XS's bases (Balazy et al. 2024, https://arxiv.org/abs/2405.17604): from random ones a
    # core hardly learns.
    Rule("core", travels="E", frozen="AD", start="svd"),
):
    RULES.add(_rule.name, _rule)
