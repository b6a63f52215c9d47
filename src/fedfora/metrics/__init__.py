"""Scores of answers by kind of task: pure functions of text, registered with what they are called.

Adding a metric is one function with `@metric` in one of these modules.
"""

from fedfora.metrics import choice, original, text, triples
from fedfora.metrics.metric import KINDS, METRICS, Answer, Metric, headlines, in_order, mean, metric

__all__ = ["KINDS", "METRICS", "Answer", "Metric", "headlines", "in_order", "mean", "metric"]
__all__ += ["choice", "original", "text", "triples"]
