"""One step's gradient with differential privacy: a Poisson sample, clipped, summed, with noise.

DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, Alg. 1): each record is in a step's
sample with probability q by itself; its gradient, cut to norm C, enters a sum; normal noise of
standard deviation z C is added; the sum is divided by the expected size of the sample, which is
public, not by its real size, which is not. What the optimizer makes of it costs nothing more.

The loss of a record is the mean over its own answer tokens: nothing of one record's loss may depend
on another record, as the mean over a batch's tokens does.
"""

import logging
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedfora.adapter.per_example import PerExampleGradients
from fedfora.data.encoding import IGNORED
from fedfora.models.batches import FILLING, Batch, collate
from fedfora.models.losses import row_losses
from fedfora.privacy.clipping import SecretNoise, add_noise, clipped_sum
from fedfora.training.packing import MAX_TOKENS

logger = logging.getLogger(__name__)

NARROWEST = 16  # tokens that a row is padded to at least; each further width is a quarter more
PIECES = 16  # a piece has a 16th of the step's rows, or of the limit of tokens where that is more
NUMBERS_AT_ONCE = 2**26  # in gradients of single rows: 256 MiB

TOLERANCE = 1e-3  # of the largest gradient: between a row alone and the row in a padded batch


@dataclass(frozen=True)
class RecordPrivacy:
    """How a site's training hides single records.

    Args:
        noise_multiplier: z.
        clipping_norm: C.
        expected_rows: Rows that a step's sample has on average.
        num_rows: Rows of the site.
    """

    noise_multiplier: float
    clipping_norm: float
    expected_rows: float
    num_rows: int

    @property
    def noise_std(self) -> float:
        """Standard deviation z C of the noise on a sum; without noise C may be infinite."""
        return self.noise_multiplier * self.clipping_norm if self.noise_multiplier else 0.0

    @property
    def sampling_rate(self) -> float:
        """The probability q with which a row is in a step's sample."""
        return self.expected_rows / self.num_rows


@dataclass(frozen=True)
class PoissonBatches:
    """The indices of each step's sample; a batch sampler for a DataLoader, empty ones too."""

    num_rows: int
    rate: float
    num_steps: int
    noise: SecretNoise

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Draw again for every step; the run's seed plays no part."""
        for _ in range(self.num_steps):
            yield self.noise.sample(self.num_rows, self.rate)


def write_private_gradient(
    model: nn.Module,
    batch: Batch,
    privacy: RecordPrivacy,
    noise: SecretNoise,
    *,
    batch_size: int,
    max_tokens: int = MAX_TOKENS["cpu"],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Give every trainable parameter its noisy gradient for one sample, and return the mean loss.

    Args:
        model: A model with a FoRA adapter, in training mode.
        batch: The sample, padded; may have no rows.
        privacy: Noise and clipping.
        noise: Where the noise comes from.
        batch_size: Rows per forward pass, at most; fewer where their gradients have no room.
        max_tokens: Padded tokens per forward pass, unless one row has more.
        context: Makes the context of the forward pass, e.g. autocast.

    Returns:
        The sample's mean loss: not private, for the site's own eyes.
    """
    torch.manual_seed(secrets.randbits(63))  # nobody may know which row has which dropout mask
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    room = NUMBERS_AT_ONCE // sum(p.numel() for p in parameters.values())
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    losses = [torch.zeros(0, device=batch["labels"].device)]
    for piece, num_rows in _pieces(batch, batch_size, max_tokens, room):
        loss_B, gradients = _gradients_or_zero(model, piece, num_rows, context)
        losses.append(loss_B)
        for name, summed in clipped_sum(gradients, privacy.clipping_norm).items():
            total[name] += summed
    noisy = add_noise(total, privacy.noise_std, noise)
    for name, parameter in parameters.items():
        parameter.grad = (noisy[name] / privacy.expected_rows).to(parameter.dtype)
    loss_N = torch.cat(losses)
    return loss_N.mean() if len(loss_N) else loss_N.sum()


def per_example_gradients(
    model: nn.Module,
    batch: Batch,
    *,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return each row's loss, of shape `(B,)`, and gradients of shape `(B, ...)` by name."""
    with PerExampleGradients(model) as collector:
        with context():
            loss_B = row_losses(model, batch)
        loss_B.sum().backward()  # type: ignore[no-untyped-call]
        gradients = collector.take()
    return loss_B.detach(), gradients


def _gradients_or_zero(
    model: nn.Module,
    piece: Batch,
    num_rows: int,
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return losses and gradients of a piece's first rows; a row that fails counts as zero.

    The steps are paid for, and an error, or an answer that does not come, would tell of the row:
    whatever happens there is an answer with noise.
    """
    try:
        loss_B, gradients = per_example_gradients(model, piece, context=context)
        return loss_B[:num_rows], {name: grad[:num_rows] for name, grad in gradients.items()}
    except Exception:
        if num_rows > 1:
            logger.exception("a piece of a private step failed; its rows are tried one by one")
            each = [
                _gradients_or_zero(model, {k: v[i : i + 1] for k, v in piece.items()}, 1, context)
                for i in range(num_rows)
            ]
            gradients = {name: torch.cat([found[name] for _, found in each]) for name in each[0][1]}
            return torch.cat([losses for losses, _ in each]), gradients
        logger.exception("a row of a private step failed and counts as nothing")
        return piece["labels"].new_zeros(0, dtype=torch.float32), {
            name: torch.zeros(1, *p.shape, device=p.device)
            for name, p in model.named_parameters()
            if p.requires_grad
        }


_checked: WeakSet[nn.Module] = WeakSet()


def self_test(model: nn.Module, num_tokens: int) -> None:
    """Check single gradients on made-up rows, before anything is paid; once for a model.

    No record and nothing that was received has a part in it: whether it fails tells nothing.

    Raises:
        ValueError: As `check_gradients` does.
    """
    if model in _checked:
        return
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(num_tokens, (2, 24), generator=generator)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, 16:] = 0
    labels_BL = ids_BL.masked_fill(mask_BL == 0, IGNORED)
    labels_BL[:, :6] = IGNORED
    device = next(model.parameters()).device
    batch = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
    check_gradients(model, {name: tensor.to(device) for name, tensor in batch.items()})
    _checked.add(model)


def check_gradients(model: nn.Module, batch: Batch) -> float:
    """Compare gradients of single examples with autograd's, before anything depends on them.

    Two claims: those of the batch add up to the batch's gradient, and the first row's is what that
    row gives alone.

    Args:
        model: A model with a FoRA adapter; its gradients are cleared.
        batch: A few rows, padded; not of records, since whether this raises is no secret.

    Returns:
        The largest deviation over the largest gradient.

    Raises:
        ValueError: If it is larger than rounding.
    """
    was_training = model.training
    model.eval()  # dropout would draw other masks for the row alone
    try:
        model.zero_grad()
        _, gradients = per_example_gradients(model, batch)
        row_losses(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        expected = _autograd(model)
        used_L = batch["attention_mask"][:1].any(dim=0)
        alone_row = {name: tensor[:1, used_L] for name, tensor in batch.items()}
        row_losses(model, alone_row).sum().backward()  # type: ignore[no-untyped-call]
        alone = _autograd(model)
    finally:
        model.zero_grad()
        model.train(was_training)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    pairs = [(gradients[name].sum(0), whole) for name, whole in expected.items()]
    pairs += [(gradients[name][0], row) for name, row in alone.items()]
    apart = torch.stack([(one - other).abs().max() for one, other in pairs])
    deviation = float(apart.max()) / max(largest, 1e-30)  # NaN if any of them is
    if not deviation <= TOLERANCE:
        raise ValueError(
            "--privacy_unit record: the gradients of single rows do not add up to the batch's "
            f"(they are {deviation:.1e} apart); this base or adapter cannot be trained with it"
        )
    return deviation


def _autograd(model: nn.Module) -> dict[str, Tensor]:
    gradients = {
        name: p.grad.float().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    model.zero_grad()
    return gradients


def _pieces(
    batch: Batch, batch_size: int, max_tokens: int, room: int
) -> Iterator[tuple[Batch, int]]:
    """Yield pieces of fixed shapes, each with the number of its real rows, which come first.

    A piece has rows of a width out of a fixed series, and so many of them as only that width, the
    number asked for, the limit of tokens and the room for gradients decide. So what a row is padded
    to, and with it the rounding of its gradient, does not depend on the others in the sample:
    without one row the others give the same in bfloat16, too. The last piece of a width is filled
    up with empty rows; pieces are small, so that they are few.
    """
    mask_NL = batch["attention_mask"]
    order_NL = (mask_NL == 0).long().argsort(dim=1, stable=True)  # all padding behind the tokens
    packed = {name: tensor.gather(1, order_NL) for name, tensor in batch.items()}
    length_N = mask_NL.sum(dim=1).clamp(min=1)
    widths = [NARROWEST]
    while widths[-1] <= mask_NL.shape[1]:
        widths.append(math.ceil(widths[-1] * 1.25 / 8) * 8)
    # Each row has padding: without any, kernels are others.
    above_N = torch.bucketize(length_N, length_N.new_tensor(widths), right=True)
    width_N = length_N.new_tensor(widths)[above_N]
    for width in sorted(set(width_N.tolist())):
        of_width = torch.nonzero(width_N == width).flatten()
        few = max(math.ceil(batch_size / PIECES), max_tokens // PIECES // width)
        num_rows = max(1, min(few, batch_size, max_tokens // width, room))
        for chosen in torch.split(of_width, num_rows):
            shape = (num_rows, width)
            piece = {}
            for name, tensor in packed.items():
                rows = tensor[chosen, :width]
                piece[name] = tensor.new_full(shape, FILLING[name])
                piece[name][: rows.shape[0], : rows.shape[1]] = rows
            piece["attention_mask"][len(chosen) :, 0] = 1  # a row of no token at all gives NaN
            yield piece, len(chosen)


# What the Trainer is told: a step is one batch, and clipping is not its business.
TRAINER_ARGUMENTS = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}


class PrivateSteps:
    """Gives a Trainer its samples and its gradients, so that every step is a release of DP-SGD.

    A step's sample comes as one batch of whatever size; it is worked through in pieces of
    `max_tokens`, and of no more rows than have room for their gradients. Accumulation and the
    clipping of whole gradients are therefore off.
    """

    def __init__(self, privacy: RecordPrivacy, max_tokens: int | None) -> None:
        self.privacy, self.max_tokens = privacy, max_tokens
        self.noise = SecretNoise()

    def dataloader(self, trainer: Any) -> Any:
        """Return all steps' samples.

        Raises:
            ValueError: If several processes train, whose noise would have to be one.
        """
        if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled:
            raise ValueError("--privacy_unit record trains in one process, without DeepSpeed")
        rows, rate = trainer.train_dataset, self.privacy.sampling_rate
        samples = PoissonBatches(len(rows), rate, trainer.stretch.num_steps, self.noise)
        return DataLoader(rows, batch_sampler=samples, collate_fn=collate)

    def step(self, trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Write a sample's noisy gradient into the parameters, and return its loss."""
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        loss = write_private_gradient(
            model,
            inputs,
            self.privacy,
            self.noise,
            batch_size=math.ceil(self.privacy.expected_rows),
            max_tokens=self.max_tokens or MAX_TOKENS[trainer.args.device.type],
            context=trainer.compute_loss_context_manager,
        )
        trainer.count(inputs, loss)
        return loss
