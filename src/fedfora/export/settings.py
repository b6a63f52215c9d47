"""What the user says about an export."""

from dataclasses import dataclass, fields
from typing import Literal

from fedfora.config import flag
from fedfora.models.settings import ModelArguments


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
    """All settings of an export."""

    export: ExportArguments
    model: ModelArguments


SECTIONS = {field.name: field.type for field in fields(ExportSettings)}
