"""Aggregation: from the sites' adapters to one, as pure functions of named tensors.

Nothing here knows Flower, models or rounds. Arithmetic is in float64, whatever travels; results are
float32. To add a rule, write its function and register one `Rule` beside it.
"""

from fedfora.federated.aggregation.gauge import GAUGES
from fedfora.federated.aggregation.robust import ROBUST
from fedfora.federated.aggregation.rule import RULES, AdapterState, Rule, Weighted
from fedfora.federated.aggregation.schedule import NAMES, Moment, rule_of_round, rules_of

__all__ = [
    "GAUGES",
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
