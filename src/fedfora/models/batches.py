"""Encoded rows to a batch, and a batch to one sequence: no padding, what all begin with once.

Rows with the same instruction have the same hidden states there: no row's own tokens come before.
So the sequence is what all rows share, then the rest of each. Every layer but attention takes
tokens one by one and needs to know nothing of it. Attention lays each row's queries, keys and
values side by side again, with the shared keys and values before them. The losses and gradients
are those of the padded batch, to rounding.

Shape suffixes: B = rows, L = tokens of the longest, S = L without the shared ones, T = tokens of
the sequence, H = heads, D = numbers of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedfora.data.encoding import IGNORED, Encoded

Batch = dict[str, Tensor]
FILLING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}  # padding is masked


def collate(rows: Encoded) -> Batch:
    """Return rows as one batch, padded on the right on whatever side the tokenizer pads.

    Args:
        rows: `input_ids` and `labels` as `fedfora.data.encoding.encode_example` makes them; maybe
            none.
    """
    if not rows:
        return {name: torch.zeros(0, 1, dtype=torch.long) for name in FILLING}
    known = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in known], True, value)
        for name, value in FILLING.items()
    }


class FlatBatch:
    """Where the tokens of a batch lie in its sequence.

    Args:
        mask_BL: Which tokens are no padding; rows are padded on the right.
        shared: How many tokens all rows begin with.
        device: Of the sequence; None for the mask's.
    """

    def __init__(self, mask_BL: Tensor, shared: int, device: Any = None) -> None:
        own_BS = mask_BL[:, shared:].bool()
        self.shared, self.shape = shared, own_BS.shape
        self.own_T = own_BS.flatten().nonzero()[:, 0].to(device or mask_BL.device)
        size = mask_BL.shape[1]
        causal_LL = torch.ones(size, size, dtype=torch.bool, device=self.own_T.device).tril()
        self.mask = causal_LL[None, None]  # of four dimensions: passed on to every layer as it is
        self.calls = 0

    def lay(self, tensor_BL: Tensor) -> Tensor:
        """Return the sequence of a tensor with a value for every token, `(1, T)`."""
        shared, own_BS = tensor_BL[0, : self.shared], tensor_BL[:, self.shared :]
        return torch.cat([shared, own_BS.flatten()[self.own_T]])[None]

    def inputs(self, ids_BL: Tensor) -> dict[str, Any]:
        """Return what the model takes: each row's positions start at 0."""
        places_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
        places = {"position_ids": self.lay(places_BL), "attention_mask": self.mask}
        return {"input_ids": self.lay(ids_BL), "flat": self, **places}

    def attend(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Return the output `(1, T, H, D)` for queries, keys and values of `(1, H, T, D)`."""
        self.calls += 1
        n = self.shared
        if mask is not None and mask.dtype == torch.bool:  # this batch's; a model adds ALiBi to it
            mask = None
        q_own, k_own, v_own = (self._beside(each_1HTD[:, :, n:]) for each_1HTD in (q, k, v))
        own_mask = mask
        if n:
            few = (self.shape[0], -1, -1, -1)
            k_own = torch.cat([k[:, :, :n].expand(few), k_own], dim=2)
            v_own = torch.cat([v[:, :, :n].expand(few), v_own], dim=2)
            own_mask = (self.mask if mask is None else mask)[:, :, n:]
        out_BSHD, _ = sdpa_attention_forward(layer, q_own, k_own, v_own, own_mask, **kwargs)
        out_THD: Tensor = out_BSHD.flatten(0, 1).index_select(0, self.own_T)
        if n:
            shared = (each_1HTD[:, :, :n] for each_1HTD in (q, k, v))
            shared_mask = None if mask is None else mask[:, :, :n, :n]
            first_1SHD, _ = sdpa_attention_forward(layer, *shared, shared_mask, **kwargs)
            out_THD = torch.cat([first_1SHD[0], out_THD])
        return out_THD[None]

    def _beside(self, own_1HTD: Tensor) -> Tensor:
        """Return the rows' own tokens, zeros behind them: `(B, H, S, D)`."""
        own_THD = own_1HTD[0].transpose(0, 1)
        empty = own_THD.new_zeros(self.shape.numel(), *own_THD.shape[1:])
        laid: Tensor = empty.index_copy(0, self.own_T, own_THD)
        return laid.view(*self.shape, *own_THD.shape[1:]).transpose(1, 2)


def _attention(*args: Any, flat: FlatBatch | None = None, **kwargs: Any) -> Any:
    """PyTorch's attention, for flat batches too; layers that are computed anew need it again."""
    if flat is None:
        return sdpa_attention_forward(*args, **kwargs)
    return flat.attend(*args, **kwargs), None


AttentionInterface.register("sdpa", _attention)


def shared_tokens(batch: Batch) -> int:
    """Return how many tokens all rows of a batch begin with, none of which has or gives a loss."""
    ids_BL, labels_BL = batch["input_ids"], batch["labels"]
    alike_L = (ids_BL == ids_BL[:1]).all(0) & batch["attention_mask"].bool().all(0)
    silent_L = (labels_BL == IGNORED).all(0)
    alike_L[:-1] &= silent_L[:-1] & silent_L[1:]
    alike_L[-1:] = False  # no row is empty
    return int(alike_L.long().cumprod(0).sum()) if len(ids_BL) > 1 else 0
