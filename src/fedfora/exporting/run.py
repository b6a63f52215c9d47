"""`fedfora export`: an adapter in the form that others load, checked before it is called done."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from fedfora.exporting.gguf import (
    architecture_of,
    check_llama_cpp,
    import_gguf,
    llama_cpp_logits,
    modelfile,
    to_gguf,
)
from fedfora.exporting.gguf_model import model_to_gguf
from fedfora.exporting.llama import export_llama
from fedfora.exporting.lora import to_lora
from fedfora.exporting.settings import MARK, ExportSettings, check_place, files_of
from fedfora.models.fingerprint import fingerprint
from fedfora.models.loading import (
    Base,
    base_name_of,
    check_adapter_dir,
    load_adapter,
    load_base,
    merge_adapter,
)
from fedfora.models.resolve import model_path, source
from fedfora.models.saving import read_prompt_format
from fedfora.models.settings import ModelArguments
from fedfora.registry import Registry
from fedfora.reporting.record import write_text

# A format writes a directory and returns lines that say how far it is from the source.
Format = Callable[[ExportSettings, Path], list[str]]
FORMATS: Registry[Format] = Registry("export format")

EXACT = 1e-5  # float32 products in another order differ by less


def export(settings: ExportSettings) -> list[str]:
    """Write the export beside its place, check it, and move it there.

    Returns:
        Lines that say what was checked and how far the result is from the source.

    Raises:
        ValueError: If the adapter or the base cannot be read, the output directory holds something,
            or the check fails; then nothing is left behind.
    """
    arguments = settings.export
    check_place(settings)
    output = Path(arguments.output_dir).resolve()
    settings = _with_base(settings)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        lines = FORMATS[arguments.format](settings, temporary)
        _put(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return lines


def _put(beside: Path, output: Path) -> None:
    """Move a finished export to its place; of what is there only an earlier export's files go."""
    names = sorted(path.name for path in beside.iterdir())
    output.mkdir(parents=True, exist_ok=True)
    for name in files_of(output):
        (output / name).unlink(missing_ok=True)
    write_text(output / MARK, json.dumps({"files": names}) + "\n")
    for name in names:
        (beside / name).replace(output / name)


def _with_base(settings: ExportSettings) -> ExportSettings:
    """Take the base that the adapter names where the user names none; a whole model needs none."""
    if settings.export.format == "quantized-base":
        return settings
    directory = Path(str(settings.export.model_dir))
    if settings.export.format == "llama" and (directory / "config.json").is_file():
        return settings
    check_adapter_dir(directory)
    if settings.model.model_name_or_path is not None:
        return settings
    return replace(
        settings, model=replace(settings.model, model_name_or_path=base_name_of(directory))
    )


@FORMATS.register("lora")
def export_lora(settings: ExportSettings, directory: Path) -> list[str]:
    """Write a LoRA adapter and compare its logits with the FoRA adapter's on the same base.

    Raises:
        ValueError: If the two differ by more than rounding.
    """
    to_lora(str(settings.export.model_dir), directory)
    expected = logits(load_adapter(load_base(settings.model), str(settings.export.model_dir)))
    lora = PeftModel.from_pretrained(load_base(settings.model).model, str(directory))
    result = deviation(expected, logits(lora))
    if result.largest > EXACT and settings.model.torch_dtype in ("auto", "float32"):
        raise ValueError(f"the exported adapter is not the same function: {result}")
    return [f"LoRA against FoRA on the same base: {result}"]


@FORMATS.register("merged")
def export_merged(settings: ExportSettings, directory: Path) -> list[str]:
    """Write base and adapter as one plain model, and say how far it is from what was trained.

    An adapter that was trained on a quantized base fits that base's rounded weights. They are
    merged into by default; the original weights are another model, whose deviation is larger.
    """
    trained = load_adapter(load_base(settings.model), str(settings.export.model_dir))
    expected = logits(trained)
    del trained
    merged, result = _merge(settings, expected, settings.export.merge_into)
    merged.model.save_pretrained(directory)
    merged.tokenizer.save_pretrained(directory)
    lines = [f"merged into the {settings.export.merge_into} base: {result}"]
    if settings.model.quantization != "none":
        other = "original" if settings.export.merge_into == "dequantized" else "dequantized"
        del merged
        lines.append(f"the {other} base would give: {_merge(settings, expected, other)[1]}")
    return lines


@FORMATS.register("gguf")
def export_gguf(settings: ExportSettings, directory: Path) -> list[str]:
    """Write base and adapter as one GGUF model for Ollama and llama.cpp, with a Modelfile.

    Raises:
        ValueError: If llama.cpp has no place for the model, or a package is missing.
    """
    arguments, model = settings.export, settings.model
    import_gguf()
    if arguments.base_gguf is not None:
        raise ValueError("--base_gguf compares an adapter alone: --format gguf-lora")
    base_path = model_path(str(model.model_name_or_path), hub=model.hub, cache_dir=model.cache_dir)
    architecture_of(AutoConfig.from_pretrained(**source(base_path)).get_text_config())
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=".merged-") as scratch:
        lines = export_merged(settings, Path(scratch))
        path = model_to_gguf(Path(scratch), directory)
        tokenizer = AutoTokenizer.from_pretrained(scratch)
    prompts = read_prompt_format(str(arguments.model_dir))
    write_text(directory / "Modelfile", modelfile(path.name, prompts, tokenizer))
    return [*lines, "as GGUF read back, equal to the bit"]


@FORMATS.register("gguf-lora")
def export_gguf_lora(settings: ExportSettings, directory: Path) -> list[str]:
    """Write a GGUF LoRA for llama.cpp; compare with it where a GGUF base is given.

    Raises:
        ValueError: If llama.cpp has no place for the model or the adapter, or a package is missing.
    """
    arguments, model = settings.export, settings.model
    import_gguf()
    if arguments.base_gguf is not None:
        check_llama_cpp()
    base_path = model_path(str(model.model_name_or_path), hub=model.hub, cache_dir=model.cache_dir)
    path = to_gguf(str(arguments.model_dir), base_path, directory)
    lines = ["read back, equal to the bit"]
    if arguments.base_gguf is None:
        return [*lines, "not run in llama.cpp: --base_gguf FILE compares the logits"]
    trained = load_adapter(load_base(settings.model), str(arguments.model_dir))
    expected = logits(trained)
    ids = probe(trained.config.get_text_config().vocab_size)
    actual = llama_cpp_logits(arguments.base_gguf, path, ids)
    result = deviation(expected, actual[..., : expected.shape[-1]])
    return [*lines, f"llama.cpp on {arguments.base_gguf} against PEFT: {result}"]


@FORMATS.register("llama")
def export_as_llama(settings: ExportSettings, directory: Path) -> list[str]:
    """Write a Baichuan with rotary positions as a Llama; an adapter is merged into its base first.

    Raises:
        ValueError: If the model is no such Baichuan, or what was written is not the same function.
    """
    source, lines = Path(str(settings.export.model_dir)), []
    with TemporaryDirectory(dir=directory.parent, prefix=".merged-") as scratch:
        if not (source / "config.json").is_file():
            lines = export_merged(settings, Path(scratch))
            source = Path(scratch)
        largest = export_llama(source, directory)
    return [*lines, f"Llama against Baichuan: largest difference of any logit {largest:.2g}"]


# How far two models' answers are apart, on fixed random tokens: the check after every export.


ROWS, LENGTH, SEED = 4, 32, 0


@dataclass(frozen=True)
class Deviation:
    """Distance between the logits of two models.

    Args:
        largest: Largest absolute difference, divided by the largest absolute logit.
        same_token: Share of positions at which both find the same next token likeliest.
    """

    largest: float
    same_token: float

    def __str__(self) -> str:
        """Return the deviation as a person reads it."""
        return f"largest deviation {self.largest:.1e}, same next token {self.same_token:.1%}"


def probe(vocab_size: int) -> Tensor:
    """Return the token ids that both models read, of shape `(ROWS, LENGTH)`."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocab_size, (ROWS, LENGTH), generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return a model's logits on the probe, in float32 on the CPU."""
    model.eval()
    ids = probe(model.config.get_text_config().vocab_size).to(model.device)
    result: Tensor = model(input_ids=ids).logits
    return result.float().cpu()


def deviation(expected: Tensor, actual: Tensor) -> Deviation:
    """Return the deviation of `actual` logits from `expected` ones."""
    largest = (expected - actual).abs().max() / expected.abs().max()
    same = (expected.argmax(-1) == actual.argmax(-1)).float().mean()
    return Deviation(float(largest), float(same))


def _merge(settings: ExportSettings, expected: Any, into: str) -> tuple[Base, Deviation]:
    """Return the merged model, and how far its logits are from the trained model's."""
    model: ModelArguments = settings.model
    if into == "original":
        model = replace(model, quantization="none")
    base = load_base(model)
    merged = merge_adapter(base, str(settings.export.model_dir))
    return replace(base, model=merged), deviation(expected, logits(merged))


@FORMATS.register("quantized-base")
def export_quantized_base(settings: ExportSettings, directory: Path) -> list[str]:
    """Write the base as sites hold it, quantized, so that the owner's own weights can stay.

    Raises:
        ValueError: If the base is not to be quantized, or what was written is another function.
    """
    if settings.model.quantization == "none":
        raise ValueError("--format quantized-base needs --quantization nf4 or int8")
    base = load_base(settings.model)
    name = fingerprint(base)
    base.model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
    del base
    settings = replace(settings, model=replace(settings.model, model_name_or_path=str(directory)))
    if (written := fingerprint(load_base(settings.model))) != name:
        raise ValueError(f"what was written is not the base: fingerprint {written}, not {name}")
    size = sum(path.stat().st_size for path in directory.iterdir())
    return [f"fingerprint {name}, as of the base itself; {size / 2**20:.1f} MiB"]
