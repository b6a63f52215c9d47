"""What the user says about an export."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from fedfora.config import flag
from fedfora.models.resolve import adapter_dir_of, base_name_of, check_named, checked_model_name
from fedfora.models.settings import ModelArguments

MARK = "fedfora_export.json"  # lists what an export wrote


@dataclass
class ExportArguments:
    """Which adapter, in which form, and where to."""

    model_dir: str | None = flag(None, "directory of the adapter; for llama also of a whole model")
    format: Literal["lora", "merged", "gguf", "gguf-lora", "llama", "quantized-base"] = flag(
        "lora",
        "lora: an adapter for any PEFT or server; merged: base and adapter as one model; gguf: the "
        "same as one file for Ollama and llama.cpp; gguf-lora: an adapter for llama.cpp; llama: a "
        "Baichuan-7B, merged where it is an adapter, as a Llama model; quantized-base: the "
        "base alone, as sites hold it",
    )
    output_dir: str = flag("out/export", "where the result is written")
    overwrite_output_dir: bool = flag(False, "write over what is in output_dir")
    merge_into: Literal["dequantized", "original"] = flag(
        "dequantized", "for merged: the base as it was trained on, or its original weights"
    )
    base_gguf: str | None = flag(
        None, "for gguf-lora: the base as a GGUF file, to compare the logits in llama.cpp with"
    )


@dataclass(frozen=True)
class ExportSettings:
    """All settings of an export; `given` are the names of those that were said."""

    given: frozenset[str]
    export: ExportArguments
    model: ModelArguments

    def __post_init__(self) -> None:
        """Refuse an export of nothing."""
        if self.export.model_dir is None and self.export.format != "quantized-base":
            raise ValueError("--model_dir is missing: the directory of the adapter")


SECTIONS = {field.name: field.type for field in fields(ExportSettings) if field.name != "given"}


def check_place(settings: ExportSettings) -> None:
    """Raise if there is nothing to export, or the result would take the place of something else.

    An export is known by its mark, which lists its files: only these are ever replaced.

    Raises:
        ValueError: Naming the flag and the directory.
    """
    arguments, named = settings.export, settings.model.model_name_or_path
    output = Path(arguments.output_dir).resolve()
    whole = (
        arguments.format == "llama" and (Path(str(arguments.model_dir)) / "config.json").is_file()
    )
    if arguments.format == "quantized-base":
        checked_model_name(settings.model)
    elif not whole:
        check_named(settings.model, adapter_dir_of(arguments.model_dir, None))
        named = named or base_name_of(str(arguments.model_dir))
    for source in filter(None, (arguments.model_dir, named)):
        if Path(source).is_dir() and Path(source).resolve() == output:
            raise ValueError(f"--output_dir {arguments.output_dir} is where {source} lies")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {arguments.output_dir} is not a directory")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not arguments.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {arguments.output_dir} is not empty (--overwrite_output_dir)"
        )
    own = {MARK, *files_of(output)}
    if foreign := sorted(path.name for path in output.iterdir() if path.name not in own):
        raise ValueError(
            f"--output_dir {arguments.output_dir} holds {', '.join(foreign[:3])}, which no export "
            "wrote: name another directory"
        )


def files_of(directory: Path) -> list[str]:
    """Return the names of the files that an export wrote into a directory."""
    try:
        return list(map(str, json.loads((directory / MARK).read_text(encoding="utf-8"))["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return []
