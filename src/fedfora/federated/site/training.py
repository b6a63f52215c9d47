"""What a site does with an adapter in a round: judge it on the held-out rows, and train it."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fedfora.adapter.state import AdapterState, set_trainable
from fedfora.evaluation.likelihood import answer_likelihoods, loss_scores
from fedfora.federated.settings import FederationSettings
from fedfora.federated.shared_noise import ROWS_OF_UNIT
from fedfora.federated.site_runtime import SiteData, SiteRuntime
from fedfora.models.batches import collate
from fedfora.privacy.clipping import SecretNoise
from fedfora.seeds import derive_seed
from fedfora.training.dp_sgd import RecordPrivacy, write_private_gradient
from fedfora.training.local import LocalResult
from fedfora.training.packing import MAX_TOKENS
from fedfora.training.privacy_plan import (
    PrivateTraining,
    plan_private_training,
    public_part,
    with_learning_rate,
)
from fedfora.training.schedule import StepWindow
from fedfora.training.trainer import StepReport

logger = logging.getLogger(__name__)


def validate(runtime: SiteRuntime, site: SiteData, adapter: AdapterState) -> dict[str, Any]:
    """Return an adapter's loss per answer token on a site's held-out rows, and their tokens."""
    if not site.validation:
        return {"validation_loss": 0.0, "validation_tokens": 0}
    runtime.load(adapter)
    likelihoods = answer_likelihoods(
        runtime.model,
        site.validation,
        batch_size=runtime.settings.evaluation.per_device_eval_batch_size,
    )
    tokens = sum(each.num_tokens for each in likelihoods)
    return {"validation_loss": loss_scores(likelihoods)["loss"], "validation_tokens": tokens}


def plan_round(
    settings: FederationSettings, ledger: str, *, num_rows: int, first_step: int
) -> PrivateTraining | None:
    """Return how a site hides its records from a given step on; nothing is spent yet.

    Raises:
        BudgetSpent: If the budget does not last for the run.
    """
    return plan_private_training(
        settings.privacy,
        settings.train,
        output_dir=settings.run.output_dir,
        ledger=ledger,
        num_rows=num_rows,
        first_step=first_step,
        total_steps=settings.federation.total_steps,
    )


def train_round(
    runtime: SiteRuntime,
    site: SiteData,
    adapter: AdapterState,
    *,
    round_index: int,
    seed: int | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    factors: str = "ABCDE",
) -> tuple[AdapterState, LocalResult]:
    """Take a site's steps of one round (counted from 0) and return its adapter's five factors.

    With record privacy, a failure that depends on rows changes no answer: only the noise is left.

    The order of rows and dropout are drawn from the seed; None is the run's. Of the `factors` that
    are trained, E stands for the core.
    """
    federation, settings = runtime.settings.federation, runtime.settings
    first_step = round_index * federation.local_steps
    private = plan_round(settings, site.ledger, num_rows=len(site.encoded), first_step=first_step)
    if private is not None:
        private.pay(federation.local_steps, round=round_index + 1)
    train = with_learning_rate(
        settings.train, settings.privacy, settings.adapter, runtime.model, federation.total_steps
    )
    seed = settings.train.seed if seed is None else seed
    for rows in (site.encoded, []):
        try:
            trained, result = runtime.train(
                adapter,
                rows,
                train,
                stretch=StepWindow(first_step, federation.local_steps, federation.total_steps),
                seed=derive_seed(seed, "train", round_index, site.index),
                on_step=on_step,
                factors=factors,
                proximal_mu=settings.aggregation.proximal_mu,
                privacy=None if private is None else private.privacy,
            )
            break
        except Exception:  # the steps are paid for: without rows they are only noise
            if private is None or not rows:
                raise
            logger.exception("round %d failed, and is trained without rows", round_index + 1)
    if private is not None:
        result = public_part(result, private.privacy)
    return trained, result


def private_sum(
    runtime: SiteRuntime, site: SiteData, adapter: AdapterState
) -> tuple[AdapterState, LocalResult]:
    """Return a step down the clipped gradients of a random sample of rows, without noise.

    The gradients are taken at `adapter`, which is folded. Noise is added before the step leaves
    (see `shared_noise`). It is their sum over `ROWS_OF_UNIT` C, in the factors that travel: A, D
    and the core.
    """
    settings, model = runtime.settings, runtime.model
    name = runtime.load(adapter)
    set_trainable(model, "ADE", name)
    for key, parameter in model.named_parameters():
        if f".fora_B.{name}." in key or f".fora_C.{name}." in key:
            parameter.requires_grad_(False)
    norm, train = settings.privacy.clipping_norm, settings.train
    rate = train.sampling_rate(settings.privacy, len(site.encoded))
    sum_alone = RecordPrivacy(0.0, norm, expected_rows=1, num_rows=len(site.encoded))
    noise = SecretNoise()
    sample = noise.sample(len(site.encoded), rate)
    rows = collate([site.encoded[i] for i in sample])
    model.train()
    write_private_gradient(
        model,
        {key: tensor.to(model.device) for key, tensor in rows.items()},
        sum_alone,
        noise,
        batch_size=math.ceil(rate * len(site.encoded)),
        max_tokens=train.max_tokens_per_pass or MAX_TOKENS[model.device.type],
        context=partial(
            torch.autocast, model.device.type, torch.bfloat16, enabled=settings.train.bf16
        ),
    )
    model.eval()
    unit = ROWS_OF_UNIT * (norm if norm < math.inf else 1.0)
    step = {}
    for key in adapter:
        layer, _, factor = key.rpartition(".")
        parameter = model.get_parameter(f"base_model.model.{layer}.fora_{factor}.{name}.weight")
        step[key] = -parameter.grad.float().cpu() / unit
    model.zero_grad()
    return step, LocalResult(steps=1, loss=0.0, answer_tokens=1, tokens=0, seconds=0.0)
