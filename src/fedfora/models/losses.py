"""What rows of a padded batch lose, with logits at no position but those that have a label.

The output layer is a model's widest, and only the answer's tokens have a loss. A hook hands it the
hidden states of those positions alone. What models do before and after it (scaling, soft caps,
Baichuan's normalized weights) stays as it is, on fewer positions: N instead of B L.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from fedfora.data.encoding import IGNORED

SHORT = 256  # tokens of a row; longer ones gain less, and the weights grow with the square


def row_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of each row's answer tokens in a padded batch, of shape `(B,)`.

    Zero for a row without an answer.

    Args:
        model: A causal language model, with or without adapter.
        batch: `input_ids`, `attention_mask` and `labels`, each of shape `(B, L)`.
    """
    loss_N, row_N = token_losses(model, batch)
    num_rows = len(batch["labels"])
    sums_B = loss_N.new_zeros(num_rows).index_add(0, row_N, loss_N)
    counts_B = row_N.bincount(minlength=num_rows)
    return sums_B / counts_B.clamp(min=1)


def token_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss of every answer token in float32, and the row it belongs to; both `(N,)`.

    Args:
        model: A causal language model, with or without adapter, maybe wrapped by a launcher.
        batch: What the model takes, and `labels` of shape `(B, L)`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets_BL = torch.full_like(batch["labels"], IGNORED)
    targets_BL[:, :-1] = batch["labels"][:, 1:]
    labeled_BL = targets_BL != IGNORED
    with _logits_only_at(model, labeled_BL), _attention_for(model, batch["labels"]):
        logits = model(**inputs, use_cache=False).logits
    logits_NV = logits[labeled_BL] if logits.shape[:2] == labeled_BL.shape else logits[0]
    loss_N = cross_entropy(logits_NV.float(), targets_BL[labeled_BL], reduction="none")
    return loss_N, labeled_BL.nonzero()[:, 0]


@contextmanager
def _logits_only_at(model: Any, labeled_BL: Tensor) -> Iterator[None]:
    """Let the output layer see hidden states of shape `(1, N, I)` instead of `(B, L, I)`."""
    head = getattr(model, "module", model).get_output_embeddings()
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
    dtype = getattr(model, "module", model).get_input_embeddings().weight.dtype
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
