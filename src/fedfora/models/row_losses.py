"""What each row of a padded batch loses: one number a row that no other row has a part in."""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedfora.data.encoding import IGNORED


def row_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of each row's answer tokens in a padded batch, of shape `(B,)`.

    Zero for a row without an answer.

    Args:
        model: A causal language model, with or without adapter.
        batch: `input_ids`, `attention_mask` and `labels`, each of shape `(B, L)`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets_BL = batch["labels"][:, 1:]
    logits_BLV = model(**inputs, use_cache=False).logits[:, :-1].float()
    loss_BL = cross_entropy(
        logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="none", ignore_index=IGNORED
    ).view_as(targets_BL)
    return loss_BL.sum(dim=1) / (targets_BL != IGNORED).sum(dim=1).clamp(min=1)
