"""Differential privacy without a model: noise, clipping, accounting, and the sentence it earns."""
