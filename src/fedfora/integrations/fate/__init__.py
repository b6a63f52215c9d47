"""FoRA inside FATE-LLM: a party of a FATE federation trains with fedfora and sums with FATE.

FATE carries the messages, masks the updates and adds them up on its own arbiter. fedfora brings the
adapter, the quantized base and the training, and the guards that FATE lacks. What was tested and
what was not: docs/fate.md.
"""
