"""Aggregation: from the sites' adapters to one, as pure functions of named tensors.

Nothing here knows Flower, models or rounds. Arithmetic is in float64, whatever travels; results are
float32. To add a rule, write its function and register one `Rule` beside it.
"""

from fedfora.federated.aggregation import means, personal, products  # each registers its rules
from fedfora.federated.aggregation.robust import ROBUST
from fedfora.federated.aggregation.rule import RULES, Rule, Update, Weighted
from fedfora.federated.aggregation.schedule import NAMES, rule_of_round

__all__ = [
    "NAMES",
    "ROBUST",
    "RULES",
    "Rule",
    "Update",
    "Weighted",
    "means",
    "personal",
    "products",
    "rule_of_round",
]
