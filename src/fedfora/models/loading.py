"""A name to a frozen base model with its tokenizer, and a fresh or saved FoRA adapter on it."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from fedfora.adapter import ForaConfig
from fedfora.adapter.config import alpha_at_rank
from fedfora.adapter.state import draw_inner_factors
from fedfora.models.resolve import base_name_of, check_adapter_dir, resolve_model, source
from fedfora.models.saving import WEIGHTS
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.protection.provenance import verify_directory
from fedfora.protection.sealing import is_sealed, load_tensors
from fedfora.seeds import derive_seed

__all__ = ["Base", "add_adapter", "base_name_of", "check_adapter_dir", "load_adapter", "load_base"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A loaded base model: frozen, maybe quantized, with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    quantization: str


def load_base(settings: ModelArguments) -> Base:
    """Load tokenizer and base model and freeze the model.

    Raises:
        ValueError: If no model is named, or the directory holds none, or no tokenizer.
    """
    path, name = resolve_model(settings), str(settings.model_name_or_path)
    tokenizer = _tokenizer_at(path, settings)
    dtype, sharded = _dtype(settings, path), is_deepspeed_zero3_enabled()
    if sharded and settings.quantization != "none":
        raise ValueError(
            f"--quantization {settings.quantization}: DeepSpeed ZeRO-3 shares out weights as they "
            "are; use --quantization none, or ZeRO-2"
        )
    try:
        loader, weights = _weights_of(path, dtype, settings)
        model = loader.from_pretrained(
            **weights,
            dtype=dtype,
            quantization_config=_quantization(settings, dtype),
            device_map=None if sharded else {"": _device(settings)},
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--model_name_or_path {name}: no model there: {error}") from error
    model.name_or_path = name  # PEFT records this; the directory a hub or package gave is no name
    model.requires_grad_(False)
    if settings.quantization == "nf4":
        _keep_training_kernels(model)
    model.eval()
    return Base(model, tokenizer, name, settings.quantization)


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
    except Exception as error:  # a strange file brings up any exception in transformers
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
    """Load the base model's tokenizer; one without a padding token pads with its end.

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
        raise ValueError(f"{settings.model_name_or_path}: its tokenizer knows no token at all")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(settings: ModelArguments) -> int | None:
    """Return how many tokens the model can hold; None where its configuration does not say.

    Raises:
        ValueError: If the model has no configuration that transformers can read.
    """
    text = _config_at(resolve_model(settings), settings).get_text_config()
    for key in ("max_position_embeddings", "model_max_length", "n_positions", "seq_length"):
        if isinstance(length := getattr(text, key, None), int):
            return length
    return None


def add_adapter(
    base: Base,
    settings: AdapterArguments,
    *,
    seed: int,
    init_weights: bool | Literal["svd"] = True,
) -> PeftModel:
    """Put a fresh FoRA adapter on the base; the same seed gives the same adapter everywhere.

    Args:
        base: The model.
        settings: Rank, targets and so on.
        seed: The run's seed.
        init_weights: As in `ForaConfig`.

    Raises:
        ValueError: If the rank or another setting is out of range.
    """
    config = fora_config(settings, base.name, init_weights=init_weights)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "adapter"))
        model = get_peft_model(base.model, config)
    draw_inner_factors(model, seed)
    return model


def fora_config(
    settings: AdapterArguments, base_name: str, *, init_weights: bool | Literal["svd"]
) -> ForaConfig:
    """Return the configuration of a fresh adapter."""
    targets = settings.target_modules
    return ForaConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        inner_dim=settings.inner_dim,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        base_model_name_or_path=base_name,
        init_weights=init_weights,
    )


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
    """Put a saved adapter on the base, for prediction; an encrypted one is never plain on a disk.

    Raises:
        ValueError: If the directory holds no adapter, its provenance does not hold, or it is
            encrypted and the key is not here.
    """
    check_adapter_dir(adapter_dir)
    directory = Path(adapter_dir)
    verify_directory(directory)
    if not is_sealed(directory / WEIGHTS):
        return PeftModel.from_pretrained(base.model, str(directory)).eval()
    tensors = load_tensors(directory / WEIGHTS)
    model = get_peft_model(base.model, PeftConfig.from_pretrained(str(directory)))
    result = set_peft_model_state_dict(model, tensors)
    if result.unexpected_keys:
        raise ValueError(f"{directory}: {result.unexpected_keys[0]} is no weight of the adapter")
    return model.eval()


def merge_adapter(base: Base, adapter_dir: str | Path) -> Any:
    """Return the base with a saved adapter inside its weights: one plain model, faster to run.

    A quantized base is dequantized first, since the sum of both would be rounded once more. The
    base is used up.

    Raises:
        ValueError: If the directory holds no adapter.
    """
    if base.quantization != "none":
        base = replace(base, model=base.model.dequantize())
    return load_adapter(base, adapter_dir).merge_and_unload(safe_merge=True).eval()


def _keep_training_kernels(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU.

    It does so on CPUs with AVX512-BF16, for faster inference in bfloat16, and never undoes it: from
    then on no gradient flows through the layer and training goes wrong without an error (seen in
    bitsandbytes 0.50.2). Without the repacking, evaluation sees exactly what training saw.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _config_at(path: str, settings: ModelArguments) -> Any:
    try:
        return AutoConfig.from_pretrained(**source(path), cache_dir=settings.cache_dir)
    except Exception as error:  # a strange file brings up any exception in transformers
        raise _no_model(settings, error) from error


def _no_model(settings: ModelArguments, error: Exception) -> ValueError:
    said = f"--model_name_or_path {settings.model_name_or_path}: no model there: "
    return ValueError(said + _first_line(error))


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
    on_cpu = _device(settings) == "cpu"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype if on_cpu else torch.bfloat16,
        bnb_4bit_use_double_quant=_double_quantization(settings, on_cpu=on_cpu),
    )


def _double_quantization(settings: ModelArguments, *, on_cpu: bool) -> bool:
    """No double quantization on the CPU: there it gives other numbers at every call."""
    asked = settings.bnb_4bit_use_double_quant
    if asked == "true" and on_cpu:
        raise ValueError(
            "--bnb_4bit_use_double_quant true: on a CPU bitsandbytes' double quantization gives "
            "other numbers at every call; leave it out"
        )
    return not on_cpu if asked == "auto" else asked == "true"
