"""A model's configuration to the memory its training takes, before any weight is loaded.

The model is built without numbers (PyTorch's meta device) and run once: shapes are exact, so the
tensors that the backward pass keeps are counted, not guessed. Attention is counted as the fused
kernels keep it: queries, keys, values, output, and the mask where there is one; or, of short rows
where that trains faster, the attention's weights.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedfora.models.adapter_base import add_adapter
from fedfora.models.batches import FlatBatch
from fedfora.models.loading import Base, check_quantized, fast_in_bfloat16, load_config
from fedfora.models.losses import plain_attention_is_faster
from fedfora.models.settings import AdapterArguments, ModelArguments

BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit format
SCALES = 256  # scales that share a scale of their own in double quantization
QUANTIZABLE = (nn.Linear, Conv1D)  # by bitsandbytes; subclasses, such as Falcon's, are not
LIBRARIES_BYTES = 7 * 2**30 // 10  # on a CPU: PyTorch and the rest, and what the heap wastes
OPTIMIZER_BYTES = {"adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "sgd": 0.0}  # else two moments


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training holds at its peak.

    Args:
        base: The frozen weights.
        adapter: The adapter's weights, gradients and optimizer states.
        activations: What one forward pass keeps for the backward pass, logits included.
        adapter_parameters: Numbers that are trained.
        sum_parameters: Those of A, D and E, which are trained where sites share their noise.
    """

    base: int
    adapter: int
    activations: int
    adapter_parameters: int
    sum_parameters: int

    @property
    def total(self) -> int:
        """Return the sum; the allocator's waste and the libraries' own memory come on top."""
        return self.base + self.adapter + self.activations


def free_memory(device: str) -> int:
    """Return the bytes that are free now on "cpu", "cuda", or what "auto" means here."""
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def estimate_memory(
    model_settings: ModelArguments,
    adapter_settings: AdapterArguments,
    *,
    lengths: Sequence[int],
    shared: int = 0,
    answer_tokens: int | None = None,
    optim: str = "adamw_torch_fused",
    gradient_checkpointing: bool = False,
    on_gpu: bool = False,
) -> MemoryEstimate:
    """Return the memory for a pass of some rows.

    Args:
        model_settings: Base model, quantization and number format.
        adapter_settings: Rank and layers.
        lengths: The rows' tokens.
        shared: Tokens that all rows begin with, computed once where the model takes flat batches.
        answer_tokens: Tokens of all rows that have a loss, and so logits; None for all.
        optim: Optimizer, as in the training settings.
        gradient_checkpointing: Whether only the borders between blocks are kept.
        on_gpu: Whether "auto" number formats and double quantization are those of a GPU.

    Raises:
        ValueError: If there is no such model.
    """
    config = load_config(model_settings)
    dtype = _dtype(model_settings, config, on_gpu)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    name, quantization = str(model_settings.model_name_or_path), model_settings.quantization
    base = Base(model, None, name, quantization)
    check_quantized(base, lambda _, module: type(module) in QUANTIZABLE)
    double = model_settings.bnb_4bit_use_double_quant
    doubled = on_gpu if double == "auto" else double == "true"
    base_bytes = _base_bytes(base.model, quantization, doubled)
    model = add_adapter(base, replace(adapter_settings, start_adapter=None), seed=0)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    trained = sum(sizes.values())
    for parameter in model.parameters():  # autocast multiplies in the base's format
        parameter.data = parameter.data.to(base.model.dtype)
    answers = min(sum(lengths), answer_tokens or sum(lengths))
    plain = plain_attention_is_faster("cuda" if on_gpu else "cpu", dtype, max(lengths))
    attention = _Attention(keeps_weights=plain and not gradient_checkpointing)
    activations = _kept_bytes(model, lengths, shared, answers, attention)
    if gradient_checkpointing:
        # transformers 5.23 renamed the method; older ones know only the old name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
        borders = _kept_bytes(model, lengths, shared, answers, attention)
        activations = borders + (activations - borders) // base.model.config.num_hidden_layers
    logits_gradient = 4 * answers * base.model.config.vocab_size
    return MemoryEstimate(
        base=base_bytes,
        adapter=int(trained * (8 + OPTIMIZER_BYTES.get(optim, 8.0))),
        activations=activations + logits_gradient,
        adapter_parameters=trained,
        sum_parameters=sum(n for name, n in sizes.items() if re.search(r"\.fora_[ADE]\.", name)),
    )


def _dtype(settings: ModelArguments, config: Any, on_gpu: bool) -> torch.dtype:
    if settings.torch_dtype != "auto":
        return getattr(torch, settings.torch_dtype)  # type: ignore[no-any-return]
    fast = settings.quantization != "int8" and fast_in_bfloat16(config)
    return torch.bfloat16 if on_gpu or fast else torch.float32


def _base_bytes(model: nn.Module, quantization: str, double: bool) -> int:
    """Bitsandbytes quantizes every linear layer but the output layer."""
    per_weight = {
        "none": None,
        "int8": 1.0,
        "nf4": 0.5 + ((1 + 4 / SCALES) if double else 4) / BLOCK,
    }[quantization]
    output = model.get_output_embeddings()  # type: ignore[operator]
    tied = getattr(model.config, "tie_word_embeddings", False)
    total = 0.0
    for module in model.modules():
        quantized = type(module) in QUANTIZABLE and module is not output
        for name, weight in module.named_parameters(recurse=False):
            if per_weight is not None and quantized and name == "weight":
                scales = 4 * weight.shape[0] if quantization == "int8" else 0
                total += weight.numel() * per_weight + scales
            elif not (tied and module is output):
                total += weight.numel() * weight.element_size()
    return int(total)


def _kept_bytes(
    model: Any, lengths: Sequence[int], shared: int, answers: int, attention: "_Attention"
) -> int:
    """Return the bytes of all different tensors that autograd keeps, weights left out.

    Of a flat batch, or of a padded one where the model does not take it.
    """
    weights = {_storage(p) for p in model.parameters()}
    # Each tensor is held so that its place is not reused.
    storages: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            storages[_storage(tensor)] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    def run(ids: Tensor, answers: int, **inputs: Any) -> None:
        storages.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with attention, hooks:
            logits_BLV = model(input_ids=ids, logits_to_keep=answers, **inputs).logits
            F.cross_entropy(logits_BLV.flatten(0, 1).float(), ids[:, :answers].flatten())

    size = len(lengths), max(lengths)
    flat = FlatBatch(torch.arange(size[1]) < torch.tensor(lengths)[:, None], shared, "meta")
    ids_1T = torch.zeros(1, shared + len(flat.own_T), dtype=torch.long, device="meta")
    model.train()
    try:
        run(ids_1T, answers, position_ids=ids_1T, attention_mask=flat.mask, flat=flat)
    except Exception:  # whatever a model says that does not know the arguments
        flat.calls = 0
    if flat.calls != model.config.get_text_config().num_hidden_layers:
        ids_BL = torch.zeros(size, dtype=torch.long, device="meta")
        run(ids_BL, min(size[1], -(-answers // size[0])))
    return sum(size for size, _ in storages.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Attention(TorchFunctionMode):
    """Lets attention keep what its kernels keep; without numbers PyTorch takes another way."""

    def __init__(self, *, keeps_weights: bool) -> None:
        super().__init__()
        self.keeps_weights = keeps_weights

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # what transformers asks of masks: is nothing padded, nothing packed?
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        arguments = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        tensors = (arguments[name] for name in ("query", "key", "value"))
        mask = arguments.get("attn_mask")
        return _Kept.apply(*tensors, mask, self.keeps_weights)  # type: ignore[no-untyped-call]


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, weights: bool
    ) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        kept = query.new_empty(*query.shape[:-1], key.shape[-2]) if weights else output
        ctx.save_for_backward(query, key, value, mask, kept)
        return output
