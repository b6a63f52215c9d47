"""`fedfora audit`: attack a run's own adapter, and report in numbers what the attacks learned.

Membership inference by loss: can one tell rows that were trained on from rows that were not? The
attack of Yeom et al. 2018 (https://arxiv.org/abs/1709.01604, Adversary 1), the simplest one: a row
with a low loss was trained on. Stronger attacks exist, so an AUC near 1/2 proves nothing; one that
is clearly above shows a leak.

Exposure: how many bits of a planted secret a model gives away by its losses. A canary is ranked by
loss among N rows that differ from it in nothing but the secret; its exposure is log2(N / rank)
(Carlini et al. 2019, https://arxiv.org/abs/1802.08232, Sec. 4.2). A model that has not seen it
ranks it at random: 1.44 bits on average, as -log2 of a uniform number has. One that tells it from
all others gives log2(N) bits.

Epsilon shown by one run, where each canary was planted once: which of two codes was planted was a
fair coin, and the attacker guesses the one whose loss the training lowered more.
"""

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfora.data.canaries import alternatives, canaries
from fedfora.data.encoding import IGNORED, Encoded, encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.evaluation.likelihood import answer_likelihoods
from fedfora.evaluation.settings import AuditArguments, audited_run
from fedfora.models.adapter_base import load_with_adapter
from fedfora.models.resolve import read_prompt_format
from fedfora.privacy.accounting import epsilon_shown
from fedfora.reporting.record import write_json

FILE = "audit.json"
UNSEEN = 1 / math.log(2)  # mean exposure of a canary that was not trained on


def audit(arguments: AuditArguments) -> dict[str, Any]:
    """Attack a run's adapter, write audit.json into the run directory, and return its content.

    All attacks are run on the adapter and on the base alone, which has seen none of the rows: what
    the two have in common is not a leak but a difference between the files.

    Raises:
        ValueError: If the directory holds no run, or there are no rows that were not trained on.
    """
    directory = Path(arguments.run or "")
    config, data, model_settings, held_out = audited_run(arguments)
    base, model = load_with_adapter(model_settings, directory)
    tokenizer = base.tokenizer
    prompts = read_prompt_format(directory) or prompt_format_of(data, tokenizer)
    sampled: list[Encoded] = []
    for file in (str(data.train_file), held_out):
        examples = load_examples(file, data)
        random.Random(0).shuffle(examples)
        sampled.append(encode_examples(examples[: arguments.max_rows], tokenizer, prompts))
    members, others = sampled
    losses_of = partial(mean_losses, model)
    seed = config["train"]["seed"]

    def membership() -> dict[str, float]:
        inside, outside = losses_of(members), losses_of(others)
        means = {"loss_in": float(inside.mean()), "loss_out": float(outside.mean())}
        return separation(inside, outside) | means

    def secrets() -> list[Tensor]:
        """Return for each canary the losses of its code and of others, the own one first."""
        values = []
        for number, canary in enumerate(canaries(data.canaries, seed)):
            rows = [canary, *alternatives(number, arguments.canary_alternatives, seed)]
            encoded = encode_examples(rows, tokenizer, prompts)
            tokens = torch.tensor([sum(t != IGNORED for t in row["labels"]) for row in encoded])
            values.append(losses_of(encoded) * tokens)  # of the whole code: some have more tokens
        return values

    adapter, after = membership(), secrets()
    with model.disable_adapter():
        before_training, before = membership(), secrets()
    content: dict[str, Any] = {
        "train_file": data.train_file,
        "held_out_file": held_out,
        "rows": [len(members), len(others)],
        "adapter": adapter,
        "base": before_training,
    }
    if data.canaries:
        content["canaries"] = {
            "copies": data.canary_copies,
            "alternatives": arguments.canary_alternatives,
            "unseen_bits": UNSEEN,
            "before_bits": [exposure(losses) for losses in before],
            "after_bits": [exposure(losses) for losses in after],
        }
    if data.canaries and data.canary_copies == 1:
        gains = [(b - a)[:2].tolist() for a, b in zip(after, before, strict=True)]
        guessed = sum(own > other for own, other in gains)
        bound = epsilon_shown(
            guessed, len(gains), config.get("privacy", {}).get("target_delta", 0.0)
        )
        content["canaries"] |= {"guessed": guessed, "epsilon_at_least": bound}
    write_json(directory / FILE, content)
    return content


def separation(members: Tensor, others: Tensor) -> dict[str, float]:
    """Return how well low losses tell members, of shape `(M,)`, from others, `(N,)`.

    Returns:
        `auc`, the probability that a random member has a lower loss than a random other row; `low`
        and `high`, its 95 % interval (Hanley and McNeil 1982,
        https://doi.org/10.1148/radiology.143.1.7063747); `true_positive_rate`, the share of members
        found where 1 % of the others are taken for members.

    Raises:
        ValueError: If one of the two is empty.
    """
    if not len(members) or not len(others):
        raise ValueError("a comparison needs rows that were trained on, and rows that were not")
    below = (members[:, None] < others[None, :]).double().mean()
    equal = (members[:, None] == others[None, :]).double().mean()
    auc = float(below + equal / 2)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (len(members) - 1) * (q1 - auc**2)
    variance += (len(others) - 1) * (q2 - auc**2)
    margin = 1.96 * math.sqrt(max(0.0, variance) / (len(members) * len(others)))
    threshold = others.sort().values[math.floor(0.01 * len(others))]
    detected = float((members < threshold).double().mean())
    low, high = max(0.0, auc - margin), min(1.0, auc + margin)
    return {"auc": auc, "low": low, "high": high, "true_positive_rate": detected}


def mean_losses(model: Any, encoded: Encoded) -> Tensor:
    """Return the mean loss of each row's answer tokens, of shape `(rows,)`."""
    likelihoods = answer_likelihoods(model, encoded)
    return torch.tensor([-row.log_probability / max(1, row.num_tokens) for row in likelihoods])


def exposure(losses: Tensor) -> float:
    """Return the exposure of the first of `losses`, of shape `(N,)`, among all of them, in bits.

    Equal losses count as lower ones: a model that cannot tell them apart gives nothing away.
    """
    rank = int((losses <= losses[0]).sum())
    return math.log2(len(losses)) - math.log2(rank)
