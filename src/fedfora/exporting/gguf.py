"""A FoRA adapter to a GGUF LoRA for llama.cpp and Ollama, read back after writing.

llama.cpp computes `y = W x + (alpha / R) B (A x)` with one alpha for all layers, names tensors by
block, and holds the rows of Llama's q and k in another order: the two halves of each head's rotary
pairs interleaved. So B's rows follow, and where a layer has a scaling of its own, B takes it in.

Shape suffixes: O outputs, I inputs, R rank.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from fedfora.adapter.state import from_peft_key, peft_key
from fedfora.data.encoding import PromptFormat, encode_prompt
from fedfora.data.loading import Example
from fedfora.exporting.lora import to_lora
from fedfora.models.resolve import source
from fedfora.models.saving import WEIGHTS
from fedfora.registry import need

FILE = "adapter.gguf"
LLAMA_CPP = "pip install llama-cpp-python"
_QUESTION = "fedfora's question"

Matrix = NDArray[np.float32]
M = TypeVar("M", Matrix, Tensor)


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


def to_gguf(adapter_dir: str | Path, base_path: str, directory: Path) -> Path:
    """Write a FoRA adapter as a GGUF LoRA, and read it back.

    Args:
        adapter_dir: Directory of the adapter.
        base_path: Directory or Hub id of its base model; only the configuration is read.
        directory: Made if it does not exist.

    Returns:
        The file.

    Raises:
        ValueError: If llama.cpp has no place for the model or for something the adapter trained, a
            package is missing, or what was written is not what was meant.
    """
    gguf = need("gguf", "gguf")
    config = AutoConfig.from_pretrained(**source(base_path)).get_text_config()
    architecture = architecture_of(config)
    with TemporaryDirectory() as scratch:
        to_lora(adapter_dir, scratch)
        lora = LoraConfig.from_pretrained(scratch)
        weights = load_file(Path(scratch) / WEIGHTS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], config.num_hidden_layers)
    alpha = float(lora.lora_alpha)
    matrices: dict[str, Matrix] = {}
    for layer, (A_RI, B_OR) in _pairs(weights).items():
        name = names.get_name(layer)
        if name is None:
            raise ValueError(f"llama.cpp knows no layer {layer} in {architecture.name} models")
        own = get_pattern_key(lora.alpha_pattern.keys(), layer)
        own_alpha = lora.alpha_pattern.get(own, lora.lora_alpha)
        rank = len(A_RI)  # llama.cpp divides alpha by it, RSLoRA by its root
        B_OR = B_OR * (own_alpha / alpha * (rank**0.5 if lora.use_rslora else 1))
        matrices[f"{name}.weight.lora_a"] = A_RI
        matrices[f"{name}.weight.lora_b"] = reorder(B_OR, layer, config, architecture)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    kind = gguf.GGMLQuantizationType.F32
    write_checked(
        writer, path, {n: (np.ascontiguousarray(m, np.float32), kind) for n, m in matrices.items()}
    )
    return path


def write_checked(writer: Any, path: Path, tensors: dict[str, tuple[Any, Any]]) -> None:
    """Finish a GGUF file with its tensors, and read it back.

    Args:
        writer: The gguf package's, with all of the file's other values.
        path: Where it writes.
        tensors: Name to the numbers and their type in the file.

    Raises:
        ValueError: If the file does not hold exactly these tensors, equal to the bit.
    """
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor for tensor in need("gguf", "gguf").GGUFReader(path).tensors}
    if set(read) != set(tensors) or any(
        read[name].tensor_type != kind or not np.array_equal(read[name].data, array, equal_nan=True)
        for name, (array, kind) in tensors.items()
    ):
        raise ValueError(f"{path}: what was written cannot be read back")


def architecture_of(config: Any) -> Architecture:
    """Return what llama.cpp calls a model.

    Raises:
        ValueError: If this exporter does not know.
    """
    if config.model_type in ARCHITECTURES:
        return ARCHITECTURES[config.model_type]
    hint = "; write it as a Llama first: --format llama" if config.model_type == "baichuan" else ""
    raise ValueError(
        f"--format gguf: no such export for {config.model_type} models{hint} "
        f"(known: {', '.join(ARCHITECTURES)}); --format merged gives a model that llama.cpp's own "
        "converter reads"
    )


def reorder(W_OX: M, layer: str, config: Any, architecture: Architecture) -> M:
    """Return the rows of q or k as llama.cpp holds them; other layers as they are.

    A head's rows are pairs (i, i + half) that one rotation turns. transformers holds all first
    halves and then all second ones, llama.cpp's Llama holds the pairs side by side.
    """
    part = layer.rsplit(".", 1)[-1]
    if not architecture.reordered or part not in ("q_proj", "k_proj"):
        return W_OX
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    grouped = W_OX.reshape(heads, 2, -1, *W_OX.shape[1:])
    return grouped.swapaxes(1, 2).reshape(W_OX.shape)


def _pairs(weights: dict[str, Any]) -> dict[str, tuple[Matrix, Matrix]]:
    """Return layer to A (R, I) and B (O, R)."""
    pairs = {}
    for key, tensor in weights.items():
        layer, _, factor = (from_peft_key(key, "lora") or "").rpartition(".")
        if factor not in ("A", "B"):
            raise ValueError(f"a GGUF adapter has no place for {key}; --format merged has")
        if factor == "A":
            other = weights[peft_key(f"{layer}.B", "lora")]
            pairs[layer] = (tensor.float().numpy(), other.float().numpy())
    return pairs


def modelfile(model: str, prompts: PromptFormat | None, tokenizer: Any) -> str:
    """Return what Ollama is told of a model: its file, and the prompt that it was trained with.

    The format: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx. Ollama takes no LoRA
    adapter in GGUF (since 0.34.1), so the file is the merged model.

    Args:
        model: The GGUF model, beside the Modelfile.
        prompts: The prompt format that was trained; None where nobody knows.
        tokenizer: The model's.
    """
    lines = [
        "# ollama create NAME -f Modelfile; ollama run NAME",
        "# (ollama create NAME -f Modelfile --quantize q4_K_M makes it smaller and less exact)",
        f"FROM ./{model}",
        "PARAMETER temperature 0",
    ]
    template = None if prompts is None else _template(prompts, tokenizer)
    if prompts is not None:
        lines.append(f"PARAMETER num_predict {prompts.max_target_length}")
    if template is None:
        lines.append(
            "# No TEMPLATE: Ollama takes the model's own where it knows it; compare first."
        )
    else:
        lines += ["# One question at a time, as in training:", f'TEMPLATE """{template}"""']
    return "\n".join(lines) + "\n"


def _template(prompts: PromptFormat, tokenizer: Any) -> str | None:
    """Return the prompt as trained, with Ollama's sign for the question; None if it has no place.

    A first token that the tokenizer puts before every text is left out: so does llama.cpp.
    """
    ids = encode_prompt(Example("", _QUESTION, None, {}), tokenizer, prompts)
    if ids[:1] == tokenizer("").input_ids[:1]:
        ids = ids[1:]
    parts = tokenizer.decode(ids).split(_QUESTION)
    if len(parts) != 2 or any(sign in part for sign in ('"""', "{{") for part in parts):
        return None
    return "{{ .Prompt }}".join(parts)


def llama_cpp_logits(base: str | Path, adapter: Path | None, ids: Tensor) -> Tensor:
    """Return the logits after every token, as llama.cpp computes them on the CPU.

    The keys and values are kept in float32, as in the model that is compared with.

    Args:
        base: A GGUF model.
        adapter: A GGUF LoRA; None for the base alone.
        ids: Token ids of shape `(B, L)`.

    Returns:
        float32 logits of shape `(B, L, vocabulary)`.

    Raises:
        ValueError: If the base cannot be read or knows fewer tokens.
    """
    from llama_cpp import GGML_TYPE_F32, Llama

    if not Path(base).is_file():
        raise ValueError(f"--base_gguf: no such file: {base}")
    model = Llama(
        str(base),
        n_ctx=ids.shape[1],
        n_batch=ids.shape[1],
        n_threads=torch.get_num_threads(),
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        lora_path=None if adapter is None else str(adapter),
        verbose=False,
    )
    if model.n_vocab() <= int(ids.max()):
        raise ValueError(f"--base_gguf {base} knows only {model.n_vocab()} tokens: another model")
    rows = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        rows.append(np.array(model.scores[: len(row)]))
    model.close()
    return torch.from_numpy(np.stack(rows)).float()
