"""`fedfora export`: an adapter in a form that other programs load, checked before it is done."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from fedfora.exporting.gguf import llama_cpp_logits, model_to_gguf, modelfile, to_gguf
from fedfora.exporting.llama import export_llama
from fedfora.exporting.lora import to_lora
from fedfora.exporting.settings import FORMATS, MARK, ExportSettings, check_place, files_of
from fedfora.models.adapter_base import (
    deviation,
    load_base_of,
    logits,
    merge_adapter,
    probe,
    same_limit,
)
from fedfora.models.fingerprint import fingerprint
from fedfora.models.loading import load_adapter, load_base, own_dtype
from fedfora.models.resolve import read_prompt_format, resolve_model, settings_of_base
from fedfora.reporting.record import write_json, write_text

EXACT = 1e-5  # float32 products in another order differ by less


def export(settings: ExportSettings) -> list[str]:
    """Write the export to a temporary directory, check it, and move it into place.

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
        write = resolve_name(f"{__name__}:{FORMATS[arguments.format].writer}")
        lines: list[str] = write(settings, temporary)
        _put(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return lines


def _put(temporary: Path, output: Path) -> None:
    """Move a finished export into place; only an earlier export's files there are removed.

    Files get the mode of any new file; safetensors writes them for their owner alone.
    """
    names = sorted(path.name for path in temporary.iterdir())
    umask = os.umask(0)
    os.umask(umask)
    output.mkdir(parents=True, exist_ok=True)
    for name in files_of(output):
        (output / name).unlink(missing_ok=True)
    write_json(output / MARK, {"files": names})
    for path in filter(Path.is_file, temporary.rglob("*")):
        path.chmod(0o666 & ~umask)
    for name in names:
        (temporary / name).replace(output / name)


def _with_base(settings: ExportSettings) -> ExportSettings:
    """Take the base that the adapter names if the user names none; a whole model needs none."""
    if FORMATS[settings.export.format].of == "base" or settings.of_whole_model:
        return settings
    directory = Path(str(settings.export.model_dir))
    given = settings.given
    if settings.model.torch_dtype == "auto":
        given -= {"torch_dtype"}
    model = settings_of_base(settings.model, directory, given)
    return replace(settings, given=given, model=model)


def export_lora(settings: ExportSettings, directory: Path) -> list[str]:
    """Write a LoRA adapter and compare its logits with the FoRA adapter's on the same base.

    Raises:
        ValueError: If the two differ by more than rounding.
    """
    adapter = str(settings.export.model_dir)
    to_lora(adapter, directory)
    base = load_base_of(settings.model, adapter, needs_tokenizer=False)
    limit = min(EXACT, same_limit(base)) if base.model.dtype == torch.float32 else same_limit(base)
    trained = load_adapter(base, adapter)
    expected = logits(trained)
    lora = PeftModel.from_pretrained(trained.unload(), str(directory))
    result = deviation(expected, logits(lora))
    result.check("the exported adapter", limit)
    return [f"LoRA against FoRA on the same base: {result}"]


def export_merged(settings: ExportSettings, directory: Path) -> list[str]:
    """Write base and adapter as one plain model, read it back, and compare it with both apart.

    An adapter that was trained on a quantized base fits that base's rounded weights. They are
    merged into by default; the original weights are another model, whose deviation is larger. The
    weights are written in the base's own number format.

    Raises:
        ValueError: If what was written is not the same function as base and adapter.
    """
    adapter, model = str(settings.export.model_dir), settings.model
    original = replace(model, quantization="none", bnb_4bit_use_double_quant="auto")
    into, quantized = settings.export.merge_into, model.quantization != "none"
    base = load_base_of(model, adapter)
    dtype = base.model.dtype if "torch_dtype" in settings.given else own_dtype(model)
    limit = same_limit(base, dtype)
    merged, trained = merge_adapter(base, adapter)
    expected = trained
    other = None
    if quantized and into == "original":
        other = deviation(trained, logits(merged))
        del merged
        base = load_base(original)
        merged, expected = merge_adapter(base, adapter)
    merged.to(dtype).save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
    del merged, base
    written = logits(load_base(replace(original, model_name_or_path=str(directory))).model)
    deviation(expected, written).check("what was written", limit)
    if not quantized:
        return [f"merged into the base, read back: {deviation(trained, written)}"]
    if other is None:
        other = deviation(trained, logits(load_adapter(load_base(original), adapter)))
    names = ("original", "dequantized") if into == "original" else ("dequantized", "original")
    return [
        f"merged into the {names[0]} base, read back: {deviation(trained, written)}",
        f"the {names[1]} base would give: {other}",
    ]


def export_gguf(settings: ExportSettings, directory: Path) -> list[str]:
    """Write base and adapter as one GGUF model for Ollama and llama.cpp, with a Modelfile.

    Raises:
        ValueError: If llama.cpp cannot hold the model, or a package is missing.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=".merged-") as scratch:
        lines = export_merged(settings, Path(scratch))
        path = model_to_gguf(Path(scratch), directory)
        tokenizer = AutoTokenizer.from_pretrained(scratch)
    prompts = read_prompt_format(str(settings.export.model_dir))
    write_text(directory / "Modelfile", modelfile(path.name, prompts, tokenizer))
    return [*lines, "as GGUF read back, equal to the bit"]


def export_gguf_lora(settings: ExportSettings, directory: Path) -> list[str]:
    """Write a GGUF LoRA for llama.cpp; compare with it if a GGUF base is given.

    Raises:
        ValueError: If llama.cpp cannot hold the model or the adapter, or a package is missing.
    """
    arguments, model = settings.export, settings.model
    path = to_gguf(str(arguments.model_dir), resolve_model(model), directory)
    lines = ["read back, equal to the bit"]
    if arguments.base_gguf is None:
        return [*lines, "not run in llama.cpp: --base_gguf FILE compares the logits"]
    trained = load_adapter(load_base_of(model, str(arguments.model_dir)), str(arguments.model_dir))
    expected = logits(trained)
    ids = probe(trained.config.get_text_config().vocab_size)
    actual = llama_cpp_logits(arguments.base_gguf, path, ids)
    result = deviation(expected, actual[..., : expected.shape[-1]])
    return [*lines, f"llama.cpp on {arguments.base_gguf} against PEFT: {result}"]


def export_as_llama(settings: ExportSettings, directory: Path) -> list[str]:
    """Write a Baichuan with rotary positions as a Llama; an adapter is merged into its base first.

    Raises:
        ValueError: If the model is no such Baichuan, or what was written is not the same function.
    """
    source, lines = Path(str(settings.export.model_dir)), []
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=".merged-") as scratch:
        if not (source / "config.json").is_file():
            lines = export_merged(settings, Path(scratch))
            source = Path(scratch)
        largest = export_llama(source, directory)
    return [*lines, f"Llama against Baichuan: largest difference of any logit {largest:.2g}"]


def export_quantized_base(settings: ExportSettings, directory: Path) -> list[str]:
    """Write the base as sites hold it, quantized, so that the owner's own weights can stay.

    Raises:
        ValueError: If the base is not to be quantized, or what was written is another function.
    """
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
