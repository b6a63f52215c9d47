"""What rows of a batch lose, with logits at no position but those that have a label.

The output layer is a model's widest, and only the answer's tokens have a loss. A hook hands it the
hidden states of those positions alone. What models do before and after it (scaling, soft caps,
Baichuan's normalized weights) stays as it is, on fewer positions: N instead of B L.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from fedfora.data.encoding import IGNORED
from fedfora.models.batches import Batch, FlatBatch, collate, shared_tokens

SHORT = 256  # tokens of a row; longer ones gain less, and the weights grow with the square


def row_losses(model: Any, batch: Batch) -> Tensor:
    """Return the mean loss of each row's answer tokens in a padded batch, of shape `(B,)`.

    Zero for a row without an answer. The model sees rows, one after the other in the batch.

    Args:
        model: A causal language model, with or without adapter.
        batch: `input_ids`, `attention_mask` and `labels`, each of shape `(B, L)`.
    """
    loss_N, row_N = losses_of(model, batch, None)
    num_rows = len(batch["labels"])
    sums_B = loss_N.new_zeros(num_rows).index_add(0, row_N, loss_N)
    counts_B = row_N.bincount(minlength=num_rows)
    return sums_B / counts_B.clamp(min=1)


def token_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of every answer token in float32, and the row it belongs to; both `(N,)`.

    No padding is computed where the model takes flat batches, and what all rows begin with once.

    Args:
        model: A causal language model, with or without adapter, maybe wrapped by a launcher.
        batch: What the model takes, and `labels` of shape `(B, L)`.
    """
    return losses_of(model, batch, flat_batch(model, batch))


def losses_of(model: Any, batch: Batch, flat: FlatBatch | None) -> tuple[Tensor, Tensor]:
    """Return what `token_losses` does, of a batch that is flat or, with None, padded."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets_BL = torch.full_like(batch["labels"], IGNORED)
    targets_BL[:, :-1] = batch["labels"][:, 1:]
    row_N = (targets_BL != IGNORED).nonzero()[:, 0]
    if flat is not None:
        inputs, targets_BL = flat.inputs(batch["input_ids"]), flat.lay(targets_BL)
    labeled_BL = targets_BL != IGNORED
    with _logits_only_at(model, labeled_BL), _attention_for(model, batch["labels"]):
        logits = model(**inputs, use_cache=False).logits
    logits_NV = logits[labeled_BL] if logits.shape[:2] == labeled_BL.shape else logits[0]
    return cross_entropy(logits_NV.float(), targets_BL[labeled_BL], reduction="none"), row_N


def flat_batch(model: Any, batch: Batch) -> FlatBatch | None:
    """Return where a batch's tokens lie in one sequence; None where the model needs padded rows."""
    shared = computed_once(model, batch)
    return None if shared is None else FlatBatch(batch["attention_mask"], shared)


def computed_once(model: Any, batch: Batch) -> int | None:
    """Return how many tokens of a flat batch all rows share; None where rows must be padded.

    Args:
        model: A causal language model, with or without adapter, maybe wrapped by a launcher.
        batch: `input_ids`, `attention_mask` and `labels`, padded on the right; with anything else,
            such as positions, it stays as it is.
    """
    if set(batch) != {"input_ids", "attention_mask", "labels"} or not lies_flat(model):
        return None
    plain = _unwrapped(model)
    config = plain.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if any(window and window < batch["input_ids"].shape[1] for window in windows):
        return None
    dropout = plain.training and (
        getattr(config, "attention_dropout", 0)
        or any(isinstance(each, nn.Dropout) and each.p for each in plain.modules())
    )
    return 0 if dropout else shared_tokens(batch)  # each row draws its own


_flat: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def lies_flat(model: Any) -> bool:
    """Return whether a model takes flat batches; it is tried on made-up rows, once for a model."""
    plain = _unwrapped(model)
    if plain not in _flat:
        _flat[plain] = _agrees(model, plain)
    return _flat[plain]


@torch.no_grad()
def _agrees(model: Any, plain: Any) -> bool:
    """Return whether made-up rows lose the same flat and padded, all layers taking part."""
    config, embeddings = plain.config.get_text_config(), plain.get_input_embeddings()
    if config._attn_implementation != "sdpa":
        return False
    weight, generator = embeddings.weight, torch.Generator().manual_seed(0)
    ids_BL = torch.randint(embeddings.num_embeddings, (3, 24), generator=generator)
    ids_BL[:, :6] = ids_BL[0, :6]
    rows = [ids[:length].tolist() for ids, length in zip(ids_BL, (24, 16, 24), strict=True)]
    encoded = [{"input_ids": ids, "labels": [IGNORED] * 7 + ids[7:]} for ids in rows]
    batch = {name: tensor.to(weight.device) for name, tensor in collate(encoded).items()}
    flat = FlatBatch(batch["attention_mask"], shared_tokens(batch))
    was_training = model.training
    model.eval()
    try:
        found, expected = (losses_of(model, batch, each)[0] for each in (flat, None))
    except Exception:  # whatever a model says that does not know the arguments
        return False
    finally:
        model.train(was_training)
    apart, spread = (found - expected).norm(), (expected - expected.mean()).norm()
    rough = torch.is_autocast_enabled(weight.device.type) or weight.dtype != torch.float32
    rough = rough or getattr(plain, "is_loaded_in_8bit", False)
    close = bool(apart < (0.2 if rough else 0.02) * spread)  # rounding: up to 0.05, and 1e-5
    return close and flat.calls == config.num_hidden_layers


def _unwrapped(model: Any) -> Any:
    """Return what a launcher wrapped."""
    return getattr(model, "module", model)


@contextmanager
def _logits_only_at(model: Any, labeled_BL: Tensor) -> Iterator[None]:
    """Let the output layer see hidden states of shape `(1, N, I)` instead of `(B, L, I)`."""
    head = _unwrapped(model).get_output_embeddings()
    if head is None:
        yield
        return

    def select(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BLI, *rest = args
        return (hidden_BLI[labeled_BL][None], *rest)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def plain_attention_is_faster(device: str, dtype: torch.dtype, tokens: int) -> bool:
    """Return whether attention that keeps its weights trains faster than the fused kernel.

    PyTorch's fused backward pass in bfloat16 on a CPU takes three to seven times as long as the
    plain products of short rows.
    """
    return device == "cpu" and dtype == torch.bfloat16 and tokens <= SHORT


@contextmanager
def _attention_for(model: Any, labels_BL: Tensor) -> Iterator[None]:
    """Choose how attention is computed in a forward pass with gradients.

    Blocks that are recomputed in the backward pass, outside of this context, stay fused.
    """
    device = labels_BL.device.type
    dtype = _unwrapped(model).get_input_embeddings().weight.dtype
    if (
        not torch.is_grad_enabled()
        or not plain_attention_is_faster(device, dtype, len(labels_BL.T))
        or any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    ):
        yield
        return
    cuda = torch.backends.cuda  # despite its name the setting is that of a CPU too
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)
