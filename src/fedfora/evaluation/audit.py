"""`fedfora audit`: attack a run's own adapter, and say in numbers what the attacks learned."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fedfora.adapter.state import read_state, set_trainable, write_state
from fedfora.data.encoding import Encoded, PromptFormat, encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.evaluation.inversion import Inversion, Protection
from fedfora.evaluation.membership import UNSEEN, code_losses, exposure, mean_losses, separation
from fedfora.evaluation.settings import AuditArguments, audited_run
from fedfora.models.adapter_base import load_base_of, settings_of_base
from fedfora.models.loading import load_adapter
from fedfora.models.saving import read_prompt_format
from fedfora.privacy.accounting import epsilon_shown
from fedfora.reporting.record import write_json

FILE = "audit.json"
OTHER_ROWS, OTHER_SITES = 7, 2  # who else is in a sum: a batch of 8, the fewest sites


def audit(arguments: AuditArguments) -> dict[str, Any]:
    """Attack a run's adapter, write audit.json into the run directory, and return its content.

    Everything is asked of the adapter and of the base alone, which has seen none of the rows: what
    the two have in common is no leak but a difference between the files.

    Raises:
        ValueError: If the directory holds no run, or there are no rows that were not trained on.
    """
    directory = Path(arguments.run or "")
    config, data, model_settings, held_out = audited_run(arguments)
    base = load_base_of(settings_of_base(model_settings, directory, ()), directory)
    model = load_adapter(base, directory)
    prompts = read_prompt_format(directory) or prompt_format_of(data, base.tokenizer)
    sampled: list[Encoded] = []
    for file in (str(data.train_file), held_out):
        examples = load_examples(file, data)
        random.Random(0).shuffle(examples)
        sampled.append(encode_examples(examples[: arguments.max_rows], base.tokenizer, prompts))
    members, others = sampled
    content = {
        "train_file": data.train_file,
        "held_out_file": held_out,
        "rows": [len(members), len(others)],
        **_membership(arguments, model, base.tokenizer, members, others),
    }
    if data.canaries:
        content["canaries"] = _canaries(arguments, config, data, model, base.tokenizer, prompts)
    if arguments.inversion_rows:
        content["inversion"] = _inversion(arguments, model, base.tokenizer, members)
    write_json(directory / FILE, content)
    return content


def _membership(
    arguments: AuditArguments, model: Any, tokenizer: Any, members: Encoded, others: Encoded
) -> dict[str, Any]:
    """Return how well low losses tell rows that were trained on, for the adapter and the base."""

    def attack() -> dict[str, Any]:
        inside, outside = (
            mean_losses(model, tokenizer, rows, batch_size=arguments.batch_size)
            for rows in (members, others)
        )
        means = {"loss_in": float(inside.mean()), "loss_out": float(outside.mean())}
        return asdict(separation(inside, outside)) | means

    results = {"adapter": attack()}
    with model.disable_adapter():
        results["base"] = attack()
    return results


def _canaries(
    arguments: AuditArguments,
    config: dict[str, Any],
    data: DataArguments,
    model: Any,
    tokenizer: Any,
    prompts: PromptFormat,
) -> dict[str, Any]:
    """Return the canaries' exposure after the training, and before it: the base's.

    Where each was planted once, also the audit in one run: which of two codes was planted was a
    fair coin, and the attacker guesses the one whose loss the training lowered more.
    """

    def attack() -> list[Tensor]:
        return code_losses(
            model,
            tokenizer,
            prompts,
            count=data.canaries,
            num_alternatives=arguments.canary_alternatives,
            seed=config["train"]["seed"],
            batch_size=arguments.batch_size,
        )

    after = attack()
    with model.disable_adapter():
        before = attack()
    found: dict[str, Any] = {
        "copies": data.canary_copies,
        "alternatives": arguments.canary_alternatives,
        "unseen_bits": UNSEEN,
        "before_bits": [exposure(losses) for losses in before],
        "after_bits": [exposure(losses) for losses in after],
    }
    if data.canary_copies == 1:
        gains = [(b - a)[:2].tolist() for a, b in zip(after, before, strict=True)]
        found["guessed"] = sum(own > other for own, other in gains)
        delta = config.get("privacy", {}).get("target_delta", 0.0)
        found["epsilon_at_least"] = epsilon_shown(found["guessed"], len(gains), delta)
    return found


def _inversion(
    arguments: AuditArguments, model: Any, tokenizer: Any, rows: Encoded
) -> list[dict[str, Any]]:
    """Return what can be read of answers from one update of an adapter that is still a no-op.

    As in a first round: later updates are attacked in the same way, and hide more by themselves.
    """
    attacked = rows[: arguments.inversion_rows]
    rest = rows[len(attacked) :]
    trained = read_state(model)
    write_state(model, {n: t * (n[-2:] not in (".B", ".D", ".E")) for n, t in trained.items()})
    set_trainable(model, "ABCDE")
    inversion = Inversion(
        model,
        tokenizer,
        num_tokens=arguments.inversion_tokens,
        num_choices=arguments.inversion_choices,
        batch_size=arguments.batch_size,
        seed=0,
    )
    noise = arguments.inversion_noise
    cases = [
        Protection("none: one row"),
        Protection(f"secure aggregation: sum of {1 + OTHER_SITES} sites", OTHER_SITES),
        Protection(f"batch of {1 + OTHER_ROWS} rows", OTHER_ROWS),
        Protection(f"record privacy, noise {noise:g}: one row", 0, noise),
    ]
    possible = [case for case in cases if case.others <= len(rest)]
    return [asdict(inversion.attack(attacked, rest, case)) for case in possible]
