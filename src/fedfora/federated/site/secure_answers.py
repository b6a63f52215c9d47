"""A site's answers under secure aggregation, as Flower's records.

In order: introduce, once a run; then share, hide, confirm and reveal, each once a round.

What the site must remember from one message to the next lies in `Context.state`, in the site's own
process: keys and seeds never touch a disk. A site that was restarted has lost them; it introduces
itself anew and takes part from the next round on.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from fedfora.federated.secure_aggregation.client import Memory, SecureSite
from fedfora.federated.secure_aggregation.fixed_point import FixedPoint, Floats
from fedfora.federated.secure_aggregation.vector import (
    Contribution,
    contribution,
    contribution_with_noise,
)
from fedfora.federated.shared_noise import SharedNoise
from fedfora.federated.site.identity import SITE_KEYS, open_identity
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
        answer = site.share(read_terms(content[TERMS]))
        return RecordDict(dict(write_round_keys(answer)))


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
            made = contribution(update_N, weight=weight, loss=loss, code=code, max_norm=max_norm)
        else:
            shared_noise.check(opened.terms, code)
            noise_N = shared_noise.draw(len(update_N), opened.terms)
            clipping_norm = shared_noise.clipping_norm
            made = contribution_with_noise(
                update_N, noise_N, code=code, clipping_norm=clipping_norm
            )
        _say_what_was_cut(made, round_number, value_range=value_range, max_norm=max_norm)
        site.mask(made.words, read_delivery(_delivery_in(content)), task=task)
        return ArrayRecord({WORDS: Array(made.words)})


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
    kept = context.state.get(STATE)
    memory = read_memory(kept) if kept is not None else Memory()
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
