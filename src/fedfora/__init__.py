"""fedfora: fine-tune language models where the data is, with FoRA adapters, alone or federated.

Importing fedfora is all the set-up there is: as soon as PEFT is loaded too, it knows the adapter
type FORA, and transformers' Auto classes know the models and the tokenizer of Baichuan. The import
itself loads neither torch nor PEFT nor transformers.

The commands are functions too, `fedfora.train` and others: see `fedfora.api`.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from fedfora.adapter import ForaConfig, ForaLayer, ForaLinear, ForaModel
    from fedfora.api import export, federate, predict, simulate, train

    __version__: str

__all__ = ["ForaConfig", "ForaLayer", "ForaLinear", "ForaModel"]
__all__ += ["__version__", "export", "federate", "predict", "simulate", "train"]

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch asks for huge pages: fewer faults

# A library, and the module that registers itself in it when imported: at once if the library is
# loaded already, otherwise when it is.
REGISTRATIONS = [
    ("peft", "fedfora.adapter"),
    ("transformers.models.auto.configuration_auto", "fedfora.models.baichuan.configuration"),
    ("transformers.models.auto.tokenization_auto", "fedfora.models.baichuan.tokenization"),
]


def _importer(module: str) -> Callable[[ModuleType], ModuleType]:
    return lambda library: import_module(module)


for _library, _module in REGISTRATIONS:
    register_post_import_hook(_importer(_module), _library)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name == "__version__":
        return version("fedfora")
    if name in __all__:
        module = "fedfora.adapter" if name.startswith("Fora") else "fedfora.api"
        return getattr(import_module(module), name)
    raise AttributeError(f"module 'fedfora' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names; what this file needs itself is of no use to anyone else."""
    return __all__
