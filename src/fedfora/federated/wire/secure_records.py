"""The messages of secure aggregation, and a site's memory of it, as Flower's records and back.

Per neighbor there is one number and one fixed-length piece of bytes, so a message is two columns:
the numbers, and all pieces one after the other.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord

from fedfora.config import Scalar
from fedfora.federated.aggregation import AdapterState
from fedfora.federated.secure_aggregation.client import Memory, OpenRound
from fedfora.federated.secure_aggregation.crypto import SignedKey
from fedfora.federated.secure_aggregation.fixed_point import Words
from fedfora.federated.secure_aggregation.messages import Delivery, Reveal, RoundKeys, Terms
from fedfora.federated.wire.transport import Layout, flatten

INTRODUCE, SHARE = "query.introduce", "query.share"
CONFIRM, REVEAL = "query.confirm", "query.reveal"
TERMS, ROSTER, KEY, WORDS = "terms", "roster", "key", "words"
SURVIVORS, SIGNATURES = "survivors", "signatures"
DELIVERY = "delivery."
KEY_BYTES, SIGNATURE_BYTES = 32, 64


def digest_of_task(rule: str, received: AdapterState, run_config: Mapping[str, Scalar]) -> bytes:
    """Return 32 bytes that differ for every other rule, adapter or settings.

    Args:
        rule: The aggregation rule of the round.
        received: What the coordinator gave: the factors that travel and the frozen ones.
        run_config: The run's settings.
    """
    layout = Layout.of(received)
    text = json.dumps([rule, layout.shapes, sorted(run_config.items())])
    return hashlib.sha256(text.encode() + b"\0" + flatten(received, layout).tobytes()).digest()


def write_key(key: SignedKey) -> ConfigRecord:
    """Return a signed key as it travels."""
    return ConfigRecord({"site": key.site, "public": key.public, "signature": key.signature})


def read_key(record: ConfigRecord) -> SignedKey:
    """Return the inverse of `write_key`."""
    return SignedKey(int(record["site"]), bytes(record["public"]), bytes(record["signature"]))


def write_keys(keys: Mapping[int, SignedKey]) -> ConfigRecord:
    """Return the keys of many sites as they travel."""
    return _write({site: key.public + key.signature for site, key in keys.items()})


def read_keys(record: ConfigRecord) -> dict[int, SignedKey]:
    """Return the inverse of `write_keys`.

    Raises:
        ValueError: If the pieces are not keys with signatures.
    """
    pieces = _read(record, KEY_BYTES + SIGNATURE_BYTES)
    return {
        site: SignedKey(site, piece[:KEY_BYTES], piece[KEY_BYTES:])
        for site, piece in pieces.items()
    }


def write_terms(terms: Terms) -> ConfigRecord:
    """Return the terms of a round as they travel."""
    return ConfigRecord(
        {
            "round": terms.round_number,
            "participants": list(terms.participants),
            "fraction": terms.fraction,
            "roster-digest": terms.roster_digest,
        }
    )


def read_terms(record: ConfigRecord) -> Terms:
    """Return the inverse of `write_terms`.

    Raises:
        ValueError: If these are not terms that protect anybody.
    """
    return Terms(
        int(record["round"]),
        tuple(record["participants"]),
        float(record["fraction"]),
        bytes(record["roster-digest"]),
    )


def write_round_keys(answer: RoundKeys) -> dict[str, ConfigRecord]:
    """Return a site's first answer as it travels."""
    key = write_key(answer.key)
    key["seed-digest"] = answer.seed_digest
    return {"key": key, "sealed": _write(answer.sealed)}


def read_round_keys(records: Mapping[str, ConfigRecord]) -> RoundKeys:
    """Return the inverse of `write_round_keys`."""
    key = records["key"]
    return RoundKeys(read_key(key), bytes(key["seed-digest"]), _read(records["sealed"]))


def write_delivery(delivery: Delivery) -> dict[str, ConfigRecord]:
    """Return what a site is told before it trains, as it travels."""
    return {
        "present": ConfigRecord({"sites": list(delivery.present)}),
        "keys": write_keys(delivery.keys),
        "sealed": _write(delivery.sealed),
    }


def read_delivery(records: Mapping[str, ConfigRecord]) -> Delivery:
    """Return the inverse of `write_delivery`."""
    return Delivery(
        tuple(records["present"]["sites"]), read_keys(records["keys"]), _read(records["sealed"])
    )


def write_signatures(signatures: Mapping[int, bytes]) -> ConfigRecord:
    """Return the sites' signatures under a list of survivors as they travel."""
    return _write(signatures)


def read_signatures(record: ConfigRecord) -> dict[int, bytes]:
    """Return the inverse of `write_signatures`.

    Raises:
        ValueError: If the pieces are not signatures.
    """
    return _read(record, SIGNATURE_BYTES)


def write_reveal(answer: Reveal) -> dict[str, ConfigRecord]:
    """Return a site's last answer as it travels."""
    return {"seeds": _write(answer.seeds), "keys": _write(answer.keys)}


def read_reveal(records: Mapping[str, ConfigRecord]) -> Reveal:
    """Return the inverse of `write_reveal`."""
    return Reveal(_read(records["seeds"]), _read(records["keys"]))


def write_memory(memory: Memory) -> ConfigRecord:
    """Return what a site remembers, for Flower's `Context.state`; it never travels or rests."""
    record = ConfigRecord({"run": memory.run, "last-round": memory.last_round})
    record["private-key"] = memory.private_key
    record["roster-digest"] = memory.roster_digest
    _put(record, "channel", _write(memory.channel_keys))
    if (opened := memory.open_round) is not None:
        _put(record, "terms", write_terms(opened.terms))
        record["round-private-key"] = opened.private_key
        record["seed"] = opened.seed
        record["present"] = list(opened.present)
        record["survivors"] = list(opened.survivors)
        _put(record, "held", _write(opened.held))
    return record


def read_memory(record: ConfigRecord) -> Memory:
    """Return the inverse of `write_memory`."""
    memory = Memory(
        run=str(record["run"]),
        private_key=bytes(record["private-key"]),
        roster_digest=bytes(record["roster-digest"]),
        channel_keys=_read(_take(record, "channel")),
        last_round=int(record["last-round"]),
    )
    if "seed" in record:
        memory.open_round = OpenRound(
            terms=read_terms(_take(record, "terms")),
            private_key=bytes(record["round-private-key"]),
            seed=bytes(record["seed"]),
            present=tuple(record["present"]),
            survivors=tuple(record["survivors"]),
            held=_read(_take(record, "held")),
        )
    return memory


def read_words(record: ArrayRecord, size: int) -> Words:
    """Return the masked words of a site.

    Raises:
        ValueError: If they are not `size` words.
    """
    if list(record) != [WORDS]:
        raise ValueError(f"arrays: expected {[WORDS]}, got {list(record)[:10]}")
    array = record[WORDS]
    header = 256  # more than numpy writes before the numbers
    if (
        array.dtype != "uint32"
        or tuple(array.shape) != (size,)
        or (len(array.data) > 4 * size + header)
    ):
        raise ValueError(
            f"expected {size} uint32 words, got {array.dtype} of shape {tuple(array.shape)} in "
            f"{len(array.data)} bytes"
        )
    words: Words = array.numpy()
    return words


def _write(pieces: Mapping[int, bytes]) -> ConfigRecord:
    return ConfigRecord({"sites": list(pieces), "bytes": b"".join(pieces.values())})


def _read(record: ConfigRecord, length: int | None = None) -> dict[int, bytes]:
    """Return pieces of equal length by site.

    Raises:
        ValueError: If the bytes cannot be shared out so.
    """
    sites, joined = [int(site) for site in record["sites"]], bytes(record["bytes"])
    each = length or len(joined) // max(1, len(sites))
    if len(set(sites)) < len(sites) or each * len(sites) != len(joined):
        raise ValueError(f"{len(joined)} bytes are not {len(sites)} pieces of equal length")
    return {site: joined[i * each : (i + 1) * each] for i, site in enumerate(sites)}


def _put(record: ConfigRecord, prefix: str, part: ConfigRecord) -> None:
    record.update({f"{prefix}/{name}": value for name, value in part.items()})


def _take(record: ConfigRecord, prefix: str) -> ConfigRecord:
    start = f"{prefix}/"
    part: dict[str, Any] = {
        name.removeprefix(start): value for name, value in record.items() if name.startswith(start)
    }
    return ConfigRecord(part)
