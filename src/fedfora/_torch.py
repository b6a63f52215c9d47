"""PyTorch, loaded when something is computed with it.

Settings name aggregation rules, server optimizers and mechanisms of privacy, whose modules are
therefore read before anything else happens. Most mistakes are found there and then: whoever makes
one should not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "torch"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _Library:
        """Stands for the module."""

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    class _TensorMeta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, import_module("torch").Tensor)

    class Tensor(metaclass=_TensorMeta):
        """Stands for the class in annotations."""

    torch = _Library()
