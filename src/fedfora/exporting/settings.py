"""The user's settings for an export."""

import json
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from fedfora.config import flag, refuse
from fedfora.models.resolve import check_adapter_dir, check_named, model_type_of
from fedfora.models.settings import ModelArguments
from fedfora.registry import need

MARK = "fedfora_export.json"  # lists what an export wrote


@dataclass(frozen=True)
class Format:
    """An export format.

    Args:
        help: What it is, for `--help`.
        of: What it is made of: an adapter and its base, either an adapter or a whole model, or the
            base alone.
        writer: Function of `fedfora.exporting.run` that takes the settings and a directory, writes
            the export and returns lines that say how it compares with its source.
    """

    help: str
    of: Literal["adapter", "adapter or model", "base"]
    writer: str


FORMATS = {
    "lora": Format("an adapter for any PEFT or server", "adapter", "export_lora"),
    "merged": Format("base and adapter as one model", "adapter", "export_merged"),
    "gguf": Format("the same as one file for Ollama and llama.cpp", "adapter", "export_gguf"),
    "gguf-lora": Format("an adapter for llama.cpp", "adapter", "export_gguf_lora"),
    "llama": Format(
        "a Baichuan-7B as a Llama model, merged if it is an adapter",
        "adapter or model",
        "export_as_llama",
    ),
    "quantized-base": Format("the base alone, as sites hold it", "base", "export_quantized_base"),
}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a model, and whether it reorders the rows of its q and k."""

    name: str
    reordered: bool = False


# By transformers' model type. Each one here has been compared with llama.cpp; see the tests.
ARCHITECTURES = {
    "llama": Architecture("LLAMA", reordered=True),
    "mistral": Architecture("LLAMA", reordered=True),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
}
OTHER_WAY = "; --format merged gives a model that llama.cpp's own converter reads"


def architecture_of(model_type: str) -> Architecture:
    """Return what llama.cpp calls a model; raise if this exporter does not know."""
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    hint = "; write it as a Llama first: --format llama" if model_type == "baichuan" else ""
    raise ValueError(
        f"--format gguf: no such export for {model_type} models{hint} "
        f"(known: {', '.join(ARCHITECTURES)}){OTHER_WAY}"
    )


@dataclass
class ExportArguments:
    """Adapter, format and output directory."""

    model_dir: str | None = flag(
        None, "directory of the adapter; for llama also of a whole model", often=True
    )
    format: str = flag(
        "lora",
        "; ".join(f"{name}: {form.help}" for name, form in FORMATS.items()),
        choices=list(FORMATS),
        often=True,
    )
    output_dir: str = flag("out/export", "where the result is written", often=True)
    overwrite_output_dir: bool = flag(False, "write over what is in output_dir", often=True)
    merge_into: Literal["dequantized", "original"] = flag(
        "dequantized",
        "for merged: the base as it was trained on, or its original weights",
        often=True,
    )
    base_gguf: str | None = flag(
        None, "for gguf-lora: the base as a GGUF file, to compare the logits in llama.cpp with"
    )


@dataclass(frozen=True)
class ExportSettings:
    """All settings of an export; `given` are the names of those the user gave."""

    given: frozenset[str]
    export: ExportArguments
    model: ModelArguments

    def __post_init__(self) -> None:
        asked = self.export
        refuse(
            (
                asked.model_dir is None and FORMATS[asked.format].of != "base",
                "--model_dir is missing: the directory of the adapter",
            ),
            (
                asked.base_gguf is not None and asked.format != "gguf-lora",
                "--base_gguf is for an adapter alone: use --format gguf-lora",
            ),
            (
                asked.merge_into == "original" and asked.format not in ("merged", "gguf", "llama"),
                f"--merge_into original: --format {asked.format} merges nothing",
            ),
            (
                asked.format == "quantized-base" and self.model.quantization == "none",
                "--format quantized-base needs --quantization nf4 or int8",
            ),
        )

    @property
    def of_whole_model(self) -> bool:
        """Whether `--model_dir` is a model by itself, not an adapter."""
        directory = Path(str(self.export.model_dir))
        takes_model = FORMATS[self.export.format].of == "adapter or model"
        return takes_model and (directory / "config.json").is_file()


SECTIONS = {field.name: field.type for field in fields(ExportSettings) if field.name != "given"}


def check_place(settings: ExportSettings) -> None:
    """Raise if there is nothing to export, or the result would replace something else.

    An export is known by its mark, which lists its files: only these are ever replaced.

    Raises:
        ValueError: Naming the flag and the directory.
    """
    arguments = settings.export
    if arguments.format.startswith("gguf"):
        need("gguf", "gguf")
    if arguments.base_gguf is not None:
        if find_spec("llama_cpp") is None:
            raise ValueError("--base_gguf needs llama.cpp: pip install llama-cpp-python")
        if not Path(arguments.base_gguf).is_file():
            raise ValueError(f"--base_gguf: no such file: {arguments.base_gguf}")
    output, form = Path(arguments.output_dir).resolve(), arguments.format
    named = adapter = arguments.model_dir
    if not settings.of_whole_model:
        if FORMATS[form].of == "base":
            adapter = None
        elif adapter is not None:
            check_adapter_dir(adapter, kind="FORA" if form in ("lora", "gguf-lora") else None)
        named = check_named(settings.model, adapter)
    if family := model_type_of(replace(settings.model, model_name_or_path=named)):
        if form.startswith("gguf"):
            architecture_of(family)
        if form == "llama" and family != "baichuan":
            raise ValueError(f"--format llama: {named} is a {family} model, not a Baichuan")
    for source in filter(None, (arguments.model_dir, named)):
        if Path(source).is_dir() and Path(source).resolve() == output:
            raise ValueError(f"--output_dir {arguments.output_dir} is where {source} is")
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
