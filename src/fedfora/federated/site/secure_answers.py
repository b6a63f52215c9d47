"""A site's answers under secure aggregation, as Flower's records.

In order: introduce, once a run; then share, hide, confirm and reveal, each once a round.

What the site must remember from one message to the next is in `Context.state`, in the site's own
process: keys and seeds never touch a disk. A site that was restarted has lost them; it introduces
itself again and takes part from the next round on. Which rounds a real site has answered is on its
disk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, RecordDict

from fedfora.federated.aggregation.update import part
from fedfora.federated.secure_aggregation.client import Memory, SecureSite
from fedfora.federated.secure_aggregation.crypto import SignedKey
from fedfora.federated.secure_aggregation.fixed_point import contribution, contribution_with_noise
from fedfora.federated.secure_aggregation.messages import Delivery, Terms, fewest_survivors
from fedfora.federated.settings import from_run_config, weight_of
from fedfora.federated.settings_scope import agreed_part
from fedfora.federated.shared_noise import SharedNoise, shared_release
from fedfora.federated.site.identity import SITE_KEYS, SITE_STATE, open_identity
from fedfora.federated.site.memory import answered_rounds
from fedfora.federated.site_runtime import SiteData
from fedfora.federated.wire import secure_records as wire
from fedfora.federated.wire.messages import Assignment
from fedfora.federated.wire.transport import Layout, flatten
from fedfora.privacy.ledger import open_ledger
from fedfora.training.local import LocalResult

STATE = "secure-aggregation"


def check_in_clear(context: Context) -> None:
    """Raise if the site's administrator asks for secure aggregation, and the run has none.

    Whether a run has it is the coordinator's claim; that the site knows other sites' keys is not.

    Raises:
        ValueError: If the node's configuration names the sites' keys.
    """
    if SITE_KEYS in context.node_config:
        raise ValueError("this site sends no update without --secure_aggregation")


def introduce(content: RecordDict, context: Context) -> RecordDict:
    """Return the site's key for this run, signed."""
    with _secure_site(context) as site:
        return RecordDict({wire.ANSWER: wire.write(site.introduce(str(context.run_id)))})


def share(content: RecordDict, context: Context) -> RecordDict:
    """Return the site's key for a round, and sealed shares for its neighbors.

    Raises:
        ValueError: If the site cannot accept keys or terms.
    """
    with _secure_site(context) as site:
        if wire.ROSTER in content:
            site.accept_roster(wire.read(dict[int, SignedKey], content[wire.ROSTER]))
        terms: Terms = wire.read(Terms, content[wire.TERMS])
        _check_promise(terms, context, num_known=len(site.pinned))
        answer = site.share(terms)
        if (answered := answered_rounds(context)) is not None:
            answered.share(str(context.run_id), terms.round_number)
        return RecordDict({wire.ANSWER: wire.write(answer)})


def _check_promise(terms: Terms, context: Context, *, num_known: int) -> None:
    """Raise if a round protects the site less than its own settings say.

    Without --secagg_min_sites a round must hold the threshold's share of all sites that a real site
    knows; a simulated one takes the run's word for how many are sampled.
    """
    settings = from_run_config(context.run_config)
    secure, asked = settings.secure, len(terms.participants)
    if terms.fraction < secure.secagg_threshold:
        raise ValueError(
            f"the round's threshold is {terms.fraction}; this site takes part from "
            f"--secagg_threshold {secure.secagg_threshold} on"
        )
    sampled = None if SITE_STATE in context.node_config else settings.federation.clients_per_round
    fewest = secure.secagg_min_sites or fewest_survivors(
        sampled or num_known, secure.secagg_threshold
    )
    if asked < fewest:
        raise ValueError(
            f"{asked} sites take part in the round; this site takes part from {fewest} on "
            "(--secagg_min_sites)"
        )


def seed_of_order(context: Context, round_number: int) -> int | None:
    """Return the seed of a real site's order of rows under secure aggregation; otherwise None."""
    answered = answered_rounds(context)
    if answered is None or not from_run_config(context.run_config).secure.secure_aggregation:
        return None
    return answered.seed(_run_of(context), round_number)


def _run_of(context: Context) -> str:
    """Return what identifies a run through all its resumptions: where the site keeps its state."""
    return Path(str(context.run_config["output_dir"])).name


def begin(context: Context, site: SiteData, round_number: int) -> Terms:
    """Return the terms of a round, and pay for it where noise is shared: before rows are looked at.

    Raises:
        ValueError: If the round is another, or was answered, or its noise does not fit.
        BudgetSpent: If it would exceed the budget.
    """
    settings = from_run_config(context.run_config)
    with _secure_site(context) as member:
        opened = member.memory.open_round
    if opened is None or opened.terms.round_number != round_number or opened.present:
        raise ValueError(f"round {round_number} was not shared for by this site, or is answered")
    if settings.shares_noise:
        code = settings.fixed_point(len(opened.terms.participants))
        SharedNoise.of(settings).check(opened.terms, code)
        open_ledger(settings.privacy, site.ledger).spend(
            shared_release(settings, 1),
            run=str(Path(settings.run.output_dir).resolve()),
            settings={"round": round_number, "clipping_norm": settings.privacy.clipping_norm},
        )
    return opened.terms


def hide(
    content: RecordDict,
    context: Context,
    site: SiteData,
    base: str,
    assignment: Assignment,
    terms: Terms,
    arrays: ArrayRecord | None,
    result: LocalResult,
) -> ArrayRecord:
    """Return what travels under secure aggregation: what the training changed, as masked words.

    Raises:
        ValueError: If a key or a share is invalid.
    """
    settings, rule = from_run_config(context.run_config), assignment.rule
    start = part(assignment.adapter, rule.travels)
    received = part(assignment.adapter, rule.travels + rule.frozen)
    layout, code = Layout.of(start), settings.fixed_point(len(terms.participants))
    # Not `unpack`, which raises if a number is not finite: under noise that would tell of rows.
    update_N = np.zeros(layout.size) if arrays is None else arrays["numbers"].numpy()
    if arrays is not None and not settings.privacy.shared_noise:  # otherwise it is a step already
        update_N = update_N - flatten(start, layout)
    if settings.shares_noise:
        noise = SharedNoise.of(settings)
        noise_N = noise.draw(layout.size, terms, code)
        norm = None if noise.of_records else noise.clipping_norm
        words = contribution_with_noise(update_N, noise_N, code=code, clipping_norm=norm)
    else:
        words = contribution(
            update_N,
            weight=weight_of(settings, result.answer_tokens, len(site.encoded)),
            loss=result.loss,
            code=code,
            max_norm=settings.rounds.max_update_norm or float("inf"),
        )
    if (answered := answered_rounds(context)) is not None:
        answered.leave(_run_of(context), terms.round_number)
    task = wire.digest_of_task(rule.name, base, received, agreed_part(settings.run_config()))
    with _secure_site(context) as member:
        member.mask(words, wire.read(Delivery, content[wire.DELIVERY]), task=task)
    return ArrayRecord({wire.WORDS: Array(words)})


def confirm(content: RecordDict, context: Context) -> RecordDict:
    """Return the site's signature under the list of sites whose vectors arrived.

    Raises:
        ValueError: If the sum would be one of too few sites, or another list was signed.
    """
    with _secure_site(context) as site:
        survivors = wire.read(tuple[int, ...], content[wire.SURVIVORS])
        return RecordDict({wire.ANSWER: wire.write(site.confirm(survivors))})


def reveal(content: RecordDict, context: Context) -> RecordDict:
    """Return what removes the masks from the sum.

    Raises:
        ValueError: If too few sites have signed the list of survivors that this site signed.
    """
    with _secure_site(context) as site:
        signatures = wire.read(dict[int, bytes], content[wire.SIGNATURES])
        return RecordDict({wire.ANSWER: wire.write(site.reveal(signatures))})


@contextmanager
def _secure_site(context: Context) -> Iterator[SecureSite]:
    """Lend the site with its memory; what changed in it is kept, even after an error."""
    seed = from_run_config(context.run_config).train.seed
    identity, pinned = open_identity(context.node_config, seed=seed)
    stored = context.state.get(STATE)
    memory = wire.read(Memory, stored) if stored is not None else Memory()
    index = int(context.node_config["partition-id"])
    try:
        yield SecureSite(index, identity, pinned, memory)
    finally:
        context.state[STATE] = wire.write(memory)
