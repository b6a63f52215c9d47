"""A merged model's directory to one GGUF file for Ollama and llama.cpp, read back after writing.

It holds what llama.cpp's own converter would write: the settings of the architecture, the tokenizer
with its chat template, the tensors under llama.cpp's names in the number format they have. Both
were compared, tensor by tensor and key by key; see docs/log.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from fedfora.exporting.gguf import architecture_of, reorder, write_checked
from fedfora.registry import need

FILE = "model.gguf"
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# How a tokenizer cuts text before it merges bytes, and what llama.cpp calls that.
_SPLITS = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    "ByteLevel": "gpt-2",
    "Digits": "smollm",
}
_OTHER_WAY = "; --format merged gives a model that llama.cpp's own converter reads"


def model_to_gguf(model_dir: Path, directory: Path) -> Path:
    """Write a model's directory as one GGUF file, and read it back.

    Args:
        model_dir: Configuration, safetensors and tokenizer of a plain transformers model.
        directory: Made if it does not exist.

    Returns:
        The file.

    Raises:
        ValueError: If llama.cpp has no place for the model or this exporter does not know its
            tokenizer or positions, a package is missing, or what was written is not what was meant.
    """
    gguf = need("gguf", "gguf")
    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    arch = gguf.MODEL_ARCH[architecture_of(config).name]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    _add_settings(writer, config)
    _add_tokenizer(gguf, writer, model_dir, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, tensor in _tensors(model_dir, config):
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ValueError(f"llama.cpp has no place for {name} in {config.model_type} models")
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
    """Return what Llama 3 divides its rotary frequencies by; None where they are plain."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    if (kind := parameters.get("rope_type", "default")) == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"--format gguf: positions are scaled by {kind!r}{_OTHER_WAY}")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(scaled)
    plain = parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    return (plain / scaled).float().numpy()


def _add_tokenizer(gguf: Any, writer: Any, model_dir: Path, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(vocab_size):
        kind = gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED
        if index in added:
            special = added[index].special
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_of(model_dir))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(model_dir, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer)


def _split_of(model_dir: Path) -> str:
    """Return llama.cpp's name of the way in which a byte-level tokenizer cuts text into words."""
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
        raise ValueError(f"--format gguf: no export for this kind of tokenizer{_OTHER_WAY}")
    return _SPLITS[key]


def _tensors(model_dir: Path, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all safetensors files, q and k in llama.cpp's order."""
    architecture = architecture_of(config)
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  # it is no mapping
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                layer = name.rsplit(".", 1)[0]
                yield name, reorder(content.get_tensor(name), layer, config, architecture)


def _held(gguf: Any, tensor: torch.Tensor) -> tuple[Any, Any]:
    """Return a tensor as the file holds it, and its type; vectors are float32 for llama.cpp."""
    if tensor.dtype not in _TYPES:
        raise ValueError(f"--format gguf: no place for numbers in {tensor.dtype}{_OTHER_WAY}")
    if tensor.ndim < 2 or tensor.dtype == torch.float32:
        return tensor.float().numpy(), gguf.GGMLQuantizationType.F32
    if tensor.dtype == torch.float16:
        return tensor.numpy(), gguf.GGMLQuantizationType.F16
    return tensor.view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
