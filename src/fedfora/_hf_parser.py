"""transformers' `HfArgumentParser`, without the rest of transformers.

The parser's file needs the standard library and YAML; the package around it takes most of a second
to load. So the file is loaded alone, unless the package is there already.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = ["HfArgumentParser"]

if TYPE_CHECKING:
    from transformers.hf_argparser import HfArgumentParser


def _load() -> Any:
    package = None if "transformers" in sys.modules else importlib.util.find_spec("transformers")
    for place in (package and package.submodule_search_locations) or ():
        file = Path(place) / "hf_argparser.py"
        spec = importlib.util.spec_from_file_location("fedfora._hf_argparser", file)
        if file.is_file() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module.HfArgumentParser
    from transformers.hf_argparser import HfArgumentParser

    return HfArgumentParser


if not TYPE_CHECKING:
    HfArgumentParser = _load()
