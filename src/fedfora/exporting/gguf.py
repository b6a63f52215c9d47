"""A FoRA adapter to a GGUF LoRA, or a merged model to one GGUF file; read back after writing.

The model's file holds what llama.cpp's own converter would write: the settings of the architecture,
the tokenizer with its chat template, the tensors under llama.cpp's names in the number format they
have. Both were compared, tensor by tensor and key by key; see docs/log.md.

Of an adapter llama.cpp computes `y = W x + (alpha / R) B (A x)` with one alpha for all layers. It
names tensors by block, and holds the rows of Llama's q and k in another order: the two halves of
each head's rotary pairs interleaved. So B's rows follow, and where a layer has a scaling of its
own, B takes it in.

Shape suffixes: O outputs, I inputs, R rank.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from fedfora.adapter.state import from_peft_key, peft_key
from fedfora.data.encoding import PromptFormat, encode_prompt
from fedfora.data.loading import Example
from fedfora.exporting.lora import to_lora
from fedfora.exporting.settings import OTHER_WAY, Architecture, architecture_of
from fedfora.models.resolve import WEIGHTS, source
from fedfora.registry import need

ADAPTER, MODEL = "adapter.gguf", "model.gguf"
_QUESTION = "fedfora's question"
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# How a tokenizer splits text before it merges bytes, and what llama.cpp calls that.
_SPLITS = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    "ByteLevel": "gpt-2",
    "Digits": "smollm",
}

Matrix = NDArray[np.float32]
M = TypeVar("M", Matrix, Tensor)


def to_gguf(adapter_dir: str | Path, base_path: str, directory: Path) -> Path:
    """Write a FoRA adapter as a GGUF LoRA, read it back, and return the file.

    Args:
        adapter_dir: Directory of the adapter.
        base_path: Directory or Hub id of its base model; only the configuration is read.
        directory: Made if it does not exist.

    Raises:
        ValueError: If llama.cpp cannot hold the model or something the adapter trained, a package
            is missing, or what was written is not what was intended.
    """
    gguf = need("gguf", "gguf")
    config = AutoConfig.from_pretrained(**source(base_path)).get_text_config()
    architecture = architecture_of(config.model_type)
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
            raise ValueError(f"llama.cpp has no layer {layer} in {architecture.name} models")
        own = get_pattern_key(lora.alpha_pattern.keys(), layer)
        own_alpha = lora.alpha_pattern.get(own, lora.lora_alpha)
        rank = len(A_RI)  # llama.cpp divides alpha by it, RSLoRA by its root
        B_OR = B_OR * (own_alpha / alpha * (rank**0.5 if lora.use_rslora else 1))
        matrices[f"{name}.weight.lora_a"] = A_RI
        matrices[f"{name}.weight.lora_b"] = reorder(B_OR, layer, config, architecture)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ADAPTER
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

    The gguf package's writer has all of the file's other values; a tensor is its numbers and their
    type in the file.

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
            raise ValueError(f"a GGUF adapter cannot hold {key}; --format merged can")
        if factor == "A":
            other = weights[peft_key(f"{layer}.B", "lora")]
            pairs[layer] = (tensor.float().numpy(), other.float().numpy())
    return pairs


def model_to_gguf(model_dir: Path, directory: Path) -> Path:
    """Write a model's directory as one GGUF file, read it back, and return the file.

    Args:
        model_dir: Configuration, safetensors and tokenizer of a plain transformers model.
        directory: Made if it does not exist.

    Raises:
        ValueError: If llama.cpp cannot hold the model or this exporter does not know its tokenizer
            or positions, a package is missing, or what was written is not what was intended.
    """
    gguf = need("gguf", "gguf")
    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    arch = gguf.MODEL_ARCH[architecture_of(config.model_type).name]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / MODEL
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    _add_settings(writer, config)
    _add_tokenizer(gguf, writer, model_dir, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, tensor in _tensors(model_dir, config):
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ValueError(f"llama.cpp cannot hold {name} in {config.model_type} models")
        tensors[place] = _held(gguf, tensor)
    if (factors := _rope_factors(config)) is not None:
        tensors["rope_freqs.weight"] = (factors, gguf.GGMLQuantizationType.F32)
    kinds = [kind for array, kind in tensors.values() if array.ndim > 1]
    kind = max(kinds, key=kinds.count).name
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    write_checked(writer, path, tensors)
    return path


def _add_settings(writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _rope_factors(config: Any) -> Any:
    """Return what Llama 3 divides its rotary frequencies by; None if they are plain."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    if (kind := parameters.get("rope_type", "default")) == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"--format gguf: no export for position scaling {kind!r}{OTHER_WAY}")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(scaled)
    plain = parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    return (plain / scaled).float().numpy()


def _add_tokenizer(gguf: Any, writer: Any, model_dir: Path, vocab_size: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kind = gguf.TokenType
    kinds = [kind.NORMAL if index in by_id else kind.UNUSED for index in range(vocab_size)]
    for index in added.keys() & range(vocab_size):
        kinds[index] = kind.CONTROL if added[index].special else kind.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_of(model_dir))
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(kinds)
    gguf.SpecialVocab(model_dir, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer)


def _split_of(model_dir: Path) -> str:
    """Return llama.cpp's name for the way a byte-level tokenizer splits text into words."""
    path = model_dir / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cutter = content.get("pre_tokenizer") or {}
    parts = [part for part in cutter.get("pretokenizers", [cutter]) if part]
    kinds = [part["type"] for part in parts]
    bytewise = content.get("model", {}).get("type") == "BPE" and kinds[-1:] == ["ByteLevel"]
    plain = bytewise and not parts[-1]["add_prefix_space"]
    cuts = plain and parts[-1].get("use_regex", True)
    if kinds == ["Split", "ByteLevel"] and plain and not cuts:
        key = parts[0]["pattern"].get("Regex", "")
    elif kinds == ["Digits", "ByteLevel"] and cuts and parts[0]["individual_digits"]:
        key = "Digits"
    else:
        key = "ByteLevel" if kinds == ["ByteLevel"] and cuts else ""
    if key not in _SPLITS:
        raise ValueError(f"--format gguf: no export for this kind of tokenizer{OTHER_WAY}")
    return _SPLITS[key]


def _tensors(model_dir: Path, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all safetensors files, q and k in llama.cpp's order."""
    architecture = architecture_of(config.model_type)
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  # it is not a mapping
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                layer = name.rsplit(".", 1)[0]
                yield name, reorder(content.get_tensor(name), layer, config, architecture)


def _held(gguf: Any, tensor: torch.Tensor) -> tuple[Any, Any]:
    """Return a tensor as the file holds it, and its type; vectors are float32 for llama.cpp."""
    if tensor.dtype not in _TYPES:
        raise ValueError(f"--format gguf: no export for numbers in {tensor.dtype}{OTHER_WAY}")
    tensor = tensor.float() if tensor.ndim < 2 else tensor
    kind = gguf.GGMLQuantizationType[_TYPES[tensor.dtype]]
    as_bytes = tensor.dtype == torch.bfloat16  # NumPy has no such type
    return (tensor.view(torch.uint8) if as_bytes else tensor).numpy(), kind


def modelfile(model: str, prompts: PromptFormat | None, tokenizer: Any) -> str:
    """Return a Modelfile for Ollama: the model's file, and the prompt that it was trained with.

    The format: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx. Ollama takes no LoRA
    adapter in GGUF (since 0.34.1), so the file is the merged model.

    Args:
        model: The GGUF model, beside the Modelfile.
        prompts: The prompt format that was trained; None if it is not known.
        tokenizer: The model's.
    """
    lines = [
        "# ollama create NAME -f Modelfile; ollama run NAME",
        "# (ollama create NAME -f Modelfile --quantize q4_K_M makes it smaller and less exact)",
        f"FROM ./{model}",
        "PARAMETER temperature 0",
    ]
    template = None
    if prompts is not None:
        template = _template(prompts, tokenizer)
        lines.append(f"PARAMETER num_predict {prompts.max_target_length}")
    if template is None:
        lines += ["# No TEMPLATE: Ollama takes the model's own where it knows it; compare first."]
    else:
        lines += ["# One question at a time, as in training:", f'TEMPLATE """{template}"""']
    return "\n".join(lines) + "\n"


def _template(prompts: PromptFormat, tokenizer: Any) -> str | None:
    """Return the prompt as trained with Ollama's placeholder for the question, if it has a place.

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

    The keys and values are kept in float32, as in the model compared with.

    Args:
        base: A GGUF model.
        adapter: A GGUF LoRA; None for the base alone.
        ids: Token ids of shape `(B, L)`.

    Returns:
        float32 logits of shape `(B, L, vocabulary)`.

    Raises:
        ValueError: If the base cannot be read or has fewer tokens.
    """
    from llama_cpp import GGML_TYPE_F32, Llama

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
        raise ValueError(f"--base_gguf {base} has only {model.n_vocab()} tokens: another model")
    rows = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        rows.append(np.array(model.scores[: len(row)]))
    model.close()
    return torch.from_numpy(np.stack(rows)).float()
