"""fedfora: fine-tune language models where the data is, with FoRA adapters, alone or federated.

Importing fedfora is all the set-up PEFT needs: as soon as PEFT is loaded too, it knows the adapter
type FORA. The import itself loads neither torch nor PEFT.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from fedfora.adapter import ForaConfig, ForaLayer, ForaLinear, ForaModel

__all__ = ["ForaConfig", "ForaLayer", "ForaLinear", "ForaModel"]

# Called at once where PEFT is loaded already, otherwise when it is.
register_post_import_hook(lambda _: import_module("fedfora.adapter"), "peft")


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name in __all__:
        return getattr(import_module("fedfora.adapter"), name)
    raise AttributeError(f"module 'fedfora' has no attribute {name!r}")
