"""A site's answers under secure aggregation, as Flower's records.

In order: introduce, once a run; then share, hide, confirm and reveal, each once a round.

What the site must remember from one message to the next lies in `Context.state`, in the site's own
process: keys and seeds never touch a disk. A site that was restarted has lost them; it introduces
itself anew and takes part from the next round on. Which rounds a real site has answered, it knows
from its disk.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from fedfora.federated.secure_aggregation.client import Memory, SecureSite
from fedfora.federated.secure_aggregation.fixed_point import FixedPoint, Floats
from fedfora.federated.secure_aggregation.messages import Terms, fewest_survivors
from fedfora.federated.secure_aggregation.vector import (
    Contribution,
    contribution,
    contribution_with_noise,
)
from fedfora.federated.settings import from_run_config
from fedfora.federated.shared_noise import SharedNoise
from fedfora.federated.site.identity import SITE_KEYS, SITE_STATE, open_identity
from fedfora.federated.site.memory import answered_rounds
from fedfora.federated.wire.secure_records import (
    DELIVERY,
    KEY,
    ROSTER,
    SIGNATURES,
    SURVIVORS,
    TERMS,
    WORDS,
    read_delivery,
    read_keys,
    read_memory,
    read_signatures,
    read_terms,
    write_key,
    write_memory,
    write_reveal,
    write_round_keys,
    write_signatures,
)

logger = logging.getLogger(__name__)

STATE = "secure-aggregation"


def check_in_clear(context: Context) -> None:
    """Raise where the site's administrator asks for secure aggregation, and the run has none.

    Whether a run has it is the coordinator's word; that the site knows other sites' keys is not.

    Raises:
        ValueError: If the node's configuration names the sites' keys.
    """
    if SITE_KEYS in context.node_config:
        raise ValueError("this site sends no update without --secure_aggregation")


def introduce(context: Context, *, seed: int) -> RecordDict:
    """Return the site's key for this run, signed."""
    with _secure_site(context, seed) as site:
        return RecordDict({KEY: write_key(site.introduce(str(context.run_id)))})


def share(content: RecordDict, context: Context, *, seed: int) -> RecordDict:
    """Return the site's key for a round, and sealed shares for its neighbors.

    Raises:
        ValueError: If keys or terms are not what the site can accept.
    """
    with _secure_site(context, seed) as site:
        if ROSTER in content:
            site.accept_roster(read_keys(content[ROSTER]))
        terms = read_terms(content[TERMS])
        _check_promise(terms, context, num_known=len(site.pinned))
        answer = site.share(terms)
        if (answered := answered_rounds(context)) is not None:
            answered.share(str(context.run_id), terms.round_number)
        return RecordDict(dict(write_round_keys(answer)))


def _check_promise(terms: Terms, context: Context, *, num_known: int) -> None:
    """Raise where a round protects the site less than its own settings say.

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
    """Return the seed of a real site's order of rows under secure aggregation; else None."""
    answered = answered_rounds(context)
    if answered is None or not from_run_config(context.run_config).secure.secure_aggregation:
        return None
    return answered.seed(_run_of(context), round_number)


def _run_of(context: Context) -> str:
    """Return what names a run through all its resumptions: where the site keeps its state."""
    return Path(str(context.run_config["output_dir"])).name


def hide(
    update_N: Floats,
    content: RecordDict,
    context: Context,
    *,
    seed: int,
    round_number: int,
    task: bytes,
    weight: int,
    loss: float,
    value_range: float,
    max_weight: int,
    max_norm: float,
    shared_noise: SharedNoise | None = None,
) -> ArrayRecord:
    """Return an update as masked words.

    Args:
        update_N: What the training changed.
        content: Of the message that asked for it.
        context: The site's.
        seed: The run's seed.
        round_number: The round that was trained; it must be the one that was shared for.
        task: A digest of what this site was asked to do.
        weight: The site's weight.
        loss: Its mean training loss.
        value_range: Larger numbers are clipped.
        max_weight: The largest weight that any site may have.
        max_norm: A longer update is shortened to this length.
        shared_noise: How single sites are hidden; then the update is clipped, and neither weight
            nor loss is told.

    Raises:
        ValueError: If the round is another, or a key or a share is not what it should be.
    """
    with _secure_site(context, seed) as site:
        opened = site.memory.open_round
        if opened is None or opened.terms.round_number != round_number:
            raise ValueError(f"round {round_number} was not shared for by this site")
        code = FixedPoint(value_range, len(opened.terms.participants), max_weight)
        if shared_noise is None:
            contribution_made = contribution(
                update_N, weight=weight, loss=loss, code=code, max_norm=max_norm
            )
        else:
            shared_noise.check(opened.terms, code)
            noise_N = shared_noise.draw(len(update_N), opened.terms, code)
            clipping_norm = shared_noise.clipping_norm
            contribution_made = contribution_with_noise(
                update_N, noise_N, code=code, clipping_norm=clipping_norm
            )
        if (answered := answered_rounds(context)) is not None:
            answered.leave(_run_of(context), round_number)
        _say_what_was_cut(
            contribution_made, round_number, value_range=value_range, max_norm=max_norm
        )
        site.mask(contribution_made.words, read_delivery(_delivery_in(content)), task=task)
        return ArrayRecord({WORDS: Array(contribution_made.words)})


def _say_what_was_cut(
    made: Contribution, round_number: int, *, value_range: float, max_norm: float
) -> None:
    if made.clipped:
        logger.warning(
            "round %d: %d numbers of the update are beyond --secagg_range %g and were clipped",
            round_number,
            made.clipped,
            value_range,
        )
    if made.shortened:
        logger.warning(
            "round %d: the update is longer than --max_update_norm %g and was shortened",
            round_number,
            max_norm,
        )


def confirm(content: RecordDict, context: Context, *, seed: int) -> RecordDict:
    """Return the site's signature under the list of sites whose vectors arrived.

    Raises:
        ValueError: If the sum would be one of too few sites, or another list was signed.
    """
    with _secure_site(context, seed) as site:
        survivors = tuple(int(index) for index in content[SURVIVORS]["sites"])
        signatures = {site.site: site.confirm(survivors)}
        return RecordDict({SIGNATURES: write_signatures(signatures)})


def reveal(content: RecordDict, context: Context, *, seed: int) -> RecordDict:
    """Return what takes the masks off the sum.

    Raises:
        ValueError: If too few sites have signed the list of survivors that this site signed.
    """
    with _secure_site(context, seed) as site:
        signatures = read_signatures(content[SIGNATURES])
        return RecordDict(dict(write_reveal(site.reveal(signatures))))


@contextmanager
def _secure_site(context: Context, seed: int) -> Iterator[SecureSite]:
    """Lend the site with its memory; what changed in it is kept, also after an error."""
    identity, pinned = open_identity(context.node_config, seed=seed)
    stored = context.state.get(STATE)
    memory = read_memory(stored) if stored is not None else Memory()
    index = int(context.node_config["partition-id"])
    try:
        yield SecureSite(index, identity, pinned, memory)
    finally:
        context.state[STATE] = write_memory(memory)


def _delivery_in(content: RecordDict) -> Mapping[str, ConfigRecord]:
    return {
        name.removeprefix(DELIVERY): record
        for name, record in content.config_records.items()
        if name.startswith(DELIVERY)
    }
