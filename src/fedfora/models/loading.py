"""A name to a frozen base model with its tokenizer, and a saved FoRA adapter on it."""

import ctypes
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from fedfora.adapter import ForaConfig
from fedfora.adapter.config import alpha_at_rank
from fedfora.models.resolve import WEIGHTS, check_adapter_dir, resolve_model, source
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.protection.provenance import signed_files
from fedfora.protection.sealing import is_sealed, load_tensors, read_bytes

logger = logging.getLogger(__name__)

UNCOVERED = 0.1  # share of the layers' weights that may be left out of something without a warning
# Change of earlier logits, as a share of the last one's. A causal model has 0, but for rounding.
LOOKS_AHEAD, LOOKS_AHEAD_ROUNDED = 1e-3, 5e-2
M_MMAP_THRESHOLD, LARGE_BYTES = -3, 2**21  # of glibc's mallopt


@dataclass(frozen=True)
class Base:
    """A loaded base model: frozen, maybe quantized, with its tokenizer (None if it has none)."""

    model: Any
    tokenizer: Any
    name: str
    quantization: str


def load_base(settings: ModelArguments, *, needs_tokenizer: bool = True) -> Base:
    """Load tokenizer and base model, freeze the model, and check that it can be trained on.

    A model without a tokenizer is refused where one is needed.

    Raises:
        ValueError: If no model is named, the directory holds no whole causal language model, there
            is no tokenizer, or the quantization does not work with the model.
    """
    path, name = resolve_model(settings), str(settings.model_name_or_path)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # A large tensor that is freed goes back to the system. On glibc's heap it leaves a hole
        # below what is kept: several GB in a step of a 7B model.
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        tokenizer = _tokenizer_at(path, settings)
    except ValueError:
        if needs_tokenizer:
            raise
        tokenizer = None
    dtype, sharded = _dtype(settings, path), is_deepspeed_zero3_enabled()
    if sharded and settings.quantization != "none":
        raise ValueError(
            f"--quantization {settings.quantization}: DeepSpeed ZeRO-3 shares out weights as they "
            "are; use --quantization none, or ZeRO-2"
        )
    try:
        loader, weights = _weights_of(path, dtype, settings)
        model, report = loader.from_pretrained(
            **weights,
            dtype=dtype,
            quantization_config=_quantization(settings, dtype),
            device_map=None if sharded else {"": _device(settings)},
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--model_name_or_path {name}: no model there: {error}") from error
    _check_whole(model, report, name)
    model.name_or_path = name  # PEFT records this; the directory a hub or package gave is no name
    model.requires_grad_(False)
    if settings.quantization == "nf4":
        # On CPUs with AVX512-BF16 bitsandbytes 0.50.2 repacks 4-bit weights at the first evaluation
        # and never undoes it: no gradient flows through them, and training goes wrong without an
        # error. Without the repacking, evaluation sees exactly what training saw.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    model.eval()
    base = Base(model, tokenizer, name, settings.quantization)
    if not sharded:
        check_quantized(base, lambda _, module: type(module).__name__ in _QUANTIZED)
        _check_causal(base)
    return base


def _check_whole(model: Any, report: dict[str, Any], name: str) -> None:
    """Raise if weights were drawn at random, or are not the base's alone."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"--model_name_or_path {name}: this base already carries an adapter")
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    missing = sorted({*report["missing_keys"], *mismatched})
    if missing:
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"--model_name_or_path {name}: the checkpoint of "
            f"{', '.join(model.config.architectures or ['an unknown class'])} does not hold all "
            f"weights of {type(model).__name__}; {', '.join(missing[:3])}{others} would be random"
        )


_QUANTIZED = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}.values()


def check_quantized(base: Base, is_quantized: Callable[[str, nn.Module], bool]) -> None:
    """Raise if no layer is quantized although that was asked for; warn if many are not.

    Raises:
        ValueError: Naming the flag.
    """
    if base.quantization == "none":
        return
    kinds, share = uncovered(base.model, is_quantized)
    flag = f"--quantization {base.quantization}"
    if share == 1:
        raise ValueError(
            f"{flag}: bitsandbytes can quantize no layer of a {type(base.model).__name__} "
            "(--quantization none)"
        )
    if share > UNCOVERED:
        logger.warning("%s leaves %.0f %% of the weights as they are: %s", flag, 100 * share, kinds)


def uncovered(model: Any, is_covered: Callable[[str, nn.Module], bool]) -> tuple[str, float]:
    """Return the kinds of weight matrices outside of some layers, and their share of all.

    Embeddings and the output layer do not count.
    """
    sizes: Counter[str] = Counter()
    covered, output = 0, model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is output:
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or ".fora_" in name:
                continue
            packed = hasattr(module, "in_features")  # 4-bit weights lie two in a byte
            size = module.in_features * module.out_features if packed else weight.numel()
            if is_covered(name, module):
                covered += size
            else:
                sizes[re.sub(r"\.\d+(?=\.|$)", ".*", f"{name}.{key}")] += size
    total = covered + sizes.total()
    kinds = ", ".join(kind for kind, _ in sizes.most_common(3))
    return kinds, sizes.total() / total if total else 0.0


@torch.no_grad()
def _check_causal(base: Base) -> None:
    """Raise if the model sees tokens that come later, by two passes over six tokens.

    An encoder would train, and be measured, with the answer in sight.
    """
    model = base.model
    first = model.config.get_text_config().vocab_size // 4
    ids = torch.arange(first, first + 6, device=model.device)[None]
    changed = ids.clone()
    changed[0, -1] = first - 1
    try:
        one, two = (
            model(input_ids=each, use_cache=False).logits.float() for each in (ids, changed)
        )
    except (RuntimeError, AssertionError) as error:
        if base.quantization == "none" or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"--quantization {base.quantization}: a {type(model).__name__} does not run with it: "
            f"{_first_line(error)} (--quantization none)"
        ) from error
    change = (one - two).abs().amax(-1)[0]
    rounded = base.quantization == "int8" or model.dtype != torch.float32
    if change[:-1].max() > (LOOKS_AHEAD_ROUNDED if rounded else LOOKS_AHEAD) * change[-1]:
        raise ValueError(
            f"--model_name_or_path {base.name}: a {type(model).__name__} attends to later "
            "tokens, and so to the answer, as encoders do; a causal language model is needed"
        )


def _weights_of(path: str, dtype: Any, settings: ModelArguments) -> tuple[Any, dict[str, Any]]:
    """Return a class and what its `from_pretrained` loads: a checkpoint, or a GGUF file's numbers.

    Transformers marks a model of a GGUF file as quantized, so that it could be neither quantized by
    bitsandbytes nor saved. Its numbers, in plain tensors, can.
    """
    if "gguf_file" not in source(path):
        checkpoint = {"pretrained_model_name_or_path": path, "cache_dir": settings.cache_dir}
        return AutoModelForCausalLM, checkpoint
    config = _config_at(path, settings)
    dtype = torch.bfloat16 if dtype == "auto" else dtype
    options: dict[str, Any] = {"dtype": dtype}
    if packing := getattr(transformers, "GgufConfig", None):  # since 5.24 it may keep the blocks
        options["quantization_config"] = packing(dequantize=True)
    try:
        read = AutoModelForCausalLM.from_pretrained(**source(path), **options)
    except Exception as error:  # a strange file raises any exception in transformers
        raise _no_model(settings, error) from error
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    state = {name: tensor.detach() for name, tensor in read.state_dict().items()}
    if config.get_text_config().tie_word_embeddings:
        state.pop("lm_head.weight", None)
    in_memory = {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}
    return type(read), in_memory


def load_tokenizer(settings: ModelArguments) -> Any:
    """Load the base model's tokenizer; its end pads where it has no padding token of the base's.

    Raises:
        ValueError: If no model is named, or it has no tokenizer.
    """
    return _tokenizer_at(resolve_model(settings), settings)


def _tokenizer_at(path: str, settings: ModelArguments) -> Any:
    config = _config_at(path, settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **source(path), config=config, cache_dir=settings.cache_dir
        )
    except Exception as error:  # tokenizers' own is none of Python's
        raise ValueError(
            f"--model_name_or_path {settings.model_name_or_path}: the model comes without a "
            "tokenizer that can be read; put its files into the same directory: "
            f"{_first_line(error)}"
        ) from error
    if not tokenizer.get_vocab():
        raise ValueError(f"{settings.model_name_or_path}: its tokenizer has no tokens")
    rows = getattr(config.get_text_config(), "vocab_size", None)
    tokenizer.embedding_rows = rows  # what `fedfora.data.encoding` holds token ids against
    outside = rows is not None and (tokenizer.pad_token_id or 0) >= rows
    if tokenizer.pad_token_id is None or outside:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(config: Any) -> int | None:
    """Return how many tokens a model can hold; None where its configuration does not say."""
    text = config.get_text_config()
    for key in ("max_position_embeddings", "model_max_length", "n_positions", "seq_length"):
        if isinstance(length := getattr(text, key, None), int):
            return length
    return None


def adapter_options(settings: AdapterArguments) -> dict[str, Any]:
    """Return the flags of an adapter by `ForaConfig`'s names; plain values."""
    targets = settings.target_modules
    return {
        "task_type": "CAUSAL_LM",
        "r": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "inner_dim": settings.inner_dim,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
    }


def fora_config(
    settings: AdapterArguments, base_name: str, *, init_weights: bool | Literal["svd"]
) -> ForaConfig:
    """Return the configuration of a fresh adapter."""
    options = adapter_options(settings)
    return ForaConfig(**options, base_model_name_or_path=base_name, init_weights=init_weights)


def add_adapter_of_rank(model: PeftModel, rank: int, adapter_name: str) -> None:
    """Add an adapter like the first, with another rank and the same scaling."""
    config = model.peft_config["default"]
    with torch.random.fork_rng():
        model.add_adapter(
            adapter_name,
            replace(
                config,
                r=rank,
                lora_alpha=alpha_at_rank(config.lora_alpha, config.r, rank, config.use_rslora),
                init_weights=True,
            ),
        )


def load_adapter(base: Base, adapter_dir: str | Path) -> PeftModel:
    """Put a saved adapter on the base, for prediction; an encrypted one is never on disk in plain.

    Raises:
        ValueError: If the directory holds no adapter, its provenance does not hold, or it is
            encrypted and the key is not here.
    """
    check_adapter_dir(adapter_dir)
    directory = Path(adapter_dir)
    files = signed_files(directory)
    if files is None and not is_sealed(directory / WEIGHTS):
        return PeftModel.from_pretrained(base.model, str(directory)).eval()
    tensors = load_tensors(directory / WEIGHTS, files)  # what was checked, not once more by PEFT
    config = json.loads(read_bytes(directory / "adapter_config.json", files))
    model = get_peft_model(base.model, PeftConfig.from_peft_type(**config))
    result = set_peft_model_state_dict(model, tensors)
    if result.unexpected_keys:
        raise ValueError(f"{directory}: {result.unexpected_keys[0]} is not a weight of the adapter")
    return model.eval()


def _config_at(path: str, settings: ModelArguments) -> Any:
    try:
        return AutoConfig.from_pretrained(**source(path), cache_dir=settings.cache_dir)
    except Exception as error:  # a strange file raises any exception in transformers
        raise _no_model(settings, error) from error


def _no_model(settings: ModelArguments, error: Exception) -> ValueError:
    name = settings.model_name_or_path
    return ValueError(f"--model_name_or_path {name}: no model there: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(": ")


def _device(settings: ModelArguments) -> str:
    """The CPU, or this process's GPU: launchers say which in LOCAL_RANK."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if settings.device == "auto":
        return gpu if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here (--device cpu)")
    return gpu if settings.device == "cuda" else settings.device


def load_config(settings: ModelArguments) -> Any:
    """Return the base model's configuration.

    Raises:
        ValueError: If no model is named, or it has no configuration that transformers can read.
    """
    return _config_at(resolve_model(settings), settings)


def own_dtype(settings: ModelArguments) -> torch.dtype:
    """Return the number format that a base's configuration names; float32 where it names none."""
    dtype = load_config(settings).get_text_config().dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def _dtype(settings: ModelArguments, path: str) -> Any:
    if settings.torch_dtype != "auto":
        return getattr(torch, settings.torch_dtype)
    if _device(settings) != "cpu":
        return "auto"
    # int8's kernels take float32.
    fast = settings.quantization != "int8" and fast_in_bfloat16(_config_at(path, settings))
    return torch.bfloat16 if fast else torch.float32


def fast_in_bfloat16(config: Any) -> bool:
    """Whether this processor multiplies bfloat16 natively and the model is wide enough to gain.

    The products of layers narrower than 256 are no faster.
    """
    native = any(
        getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")
    )
    return native and getattr(config.get_text_config(), "hidden_size", 0) >= 256


def _quantization(settings: ModelArguments, dtype: Any) -> BitsAndBytesConfig | None:
    if settings.quantization == "none":
        return None
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    on_cpu, double = _device(settings) == "cpu", settings.bnb_4bit_use_double_quant
    if double == "true" and on_cpu:
        raise ValueError(
            "--bnb_4bit_use_double_quant true: on a CPU bitsandbytes' double quantization gives "
            "different numbers at every call; leave it out"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype if on_cpu else torch.bfloat16,
        bnb_4bit_use_double_quant=not on_cpu if double == "auto" else double == "true",
    )
