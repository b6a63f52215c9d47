"""Rules that average factors: `fedavg`, `ffa`, `core` and `share-a`.

The mean of A, D and K - I is not the mean of D K A. It is where all factors but one are the same at
all sites: in `ffa` (what travels is the product D K, next to a frozen A) and in `core`.

Shape suffixes: K = sites, N = all numbers that travel.
"""

from collections.abc import Iterable

from fedfora._torch import Tensor, torch
from fedfora.federated.aggregation.rule import RULES, Combine, Rule, checked
from fedfora.federated.aggregation.update import AdapterState, Weighted


def mean_of_factors(
    current: AdapterState, updates: Iterable[Weighted], combine: Combine | None = None
) -> AdapterState:
    """Mean of each factor (McMahan et al. 2017, https://arxiv.org/abs/1602.05629, Alg. 1).

    The updates are read one by one and added up, so one adapter is in memory however many sites
    there are; a robust `combine` needs them all, as differences from the global adapter.

    Args:
        current: The global adapter's factors that travel.
        updates: Pairs of update and weight, e.g. the tokens trained on; weights are positive.
        combine: What to do instead of the mean.

    Raises:
        ValueError: If there is no update, or a weight is not positive.
    """
    if combine is not None:
        return _combined(current, list(checked(updates)), combine)
    total = 0.0
    sums: dict[str, Tensor] = {}
    for update, weight in checked(updates):
        total += weight
        for name, value in update.items():
            term = weight * value.double()
            sums[name] = sums[name] + term if name in sums else term
    return {name: (value / total).float() for name, value in sums.items()}


def _combined(current: AdapterState, pairs: list[Weighted], combine: Combine) -> AdapterState:
    before_N = _flat(current, current)
    deltas_KN = torch.stack([_flat(update, current) - before_N for update, _ in pairs])
    weights_K = torch.tensor([weight for _, weight in pairs], dtype=torch.float64)
    after_N = before_N + combine(deltas_KN, weights_K)
    pieces = torch.split(after_N, [value.numel() for value in current.values()])
    return {
        name: piece.reshape(value.shape).float()
        for (name, value), piece in zip(current.items(), pieces, strict=True)
    }


def _flat(update: AdapterState, order: AdapterState) -> Tensor:
    return torch.cat([update[name].double().flatten() for name in order])


RULES.add("fedavg", Rule("fedavg", mean_of_factors, travels="ADE"))

# FFA-LoRA (Sun et al. 2024, https://arxiv.org/abs/2403.12313) with FoRA's core, which D absorbs.
RULES.add("ffa", Rule("ffa", mean_of_factors, travels="D", frozen="A", absorbs=True))

# LoRA-XS's bases (Balazy et al. 2024, https://arxiv.org/abs/2405.17604): from random ones a core
# hardly learns.
RULES.add("core", Rule("core", mean_of_factors, travels="E", frozen="AD", start="svd"))

# FedSA-LoRA (Guo et al. 2024, https://arxiv.org/abs/2410.01463): A learns what is common.
RULES.add("share-a", Rule("share-a", mean_of_factors, travels="A", personal="DE"))
