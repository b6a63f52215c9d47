"""Secure aggregation: seconds and bytes of a round for each site, and the error of its mean.

A whole round of the protocol on random updates, without training: every site shares, masks,
confirms and reveals, some drop out after sharing, the coordinator takes the masks off. Seconds are
processor time of one thread. Bytes are those of Flower's records; `uplink_ratio` is all that a site
sends in a round over the same numbers in float32. `consistency_round_of_a_site` is what the
signatures under the list of survivors cost: to make one, and to check those of the others.

A case SITESxNUMBERSxMASKED stops after so many sites have masked: their seconds are those of a
whole round, but nothing is summed up, and the coordinator's last step is not measured.

    python benchmarks/protection_secure_aggregation.py [--cases 5x65000 500x5000000x10 ...]
"""

import argparse
import time
from collections.abc import Callable
from statistics import mean
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord

import record
from fedfora.federated.secure_aggregation.client import Memory, SecureSite
from fedfora.federated.secure_aggregation.crypto import Identity
from fedfora.federated.secure_aggregation.fixed_point import FixedPoint
from fedfora.federated.secure_aggregation.messages import Terms, digest_of
from fedfora.federated.secure_aggregation.server import SecureRound
from fedfora.federated.wire.secure_records import write

RANGE, FRACTION, LARGEST_WEIGHT = 1.0, 0.66, 4096
DROPPED = 0.04  # share of the sites whose vectors never arrive, rounded up

T = TypeVar("T")


class Clock:
    """Seconds of the processor by what they went into, one entry for each call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, what: str, work: Callable[[], T]) -> T:
        """Do some work and note its seconds."""
        started = time.thread_time()
        result = work()
        self.seconds.setdefault(what, []).append(time.thread_time() - started)
        return result

    def mean(self, what: str) -> float:
        """Return the mean over the calls."""
        return mean(self.seconds[what])

    def sum(self, what: str) -> float:
        """Return the sum over the calls."""
        return sum(self.seconds.get(what, [0.0]))


def size(records: dict[str, ConfigRecord]) -> int:
    """Return the bytes of records as Flower sends them."""
    return sum(len(part.deflate()) for part in records.values())


def update_of(site: int, numbers: int) -> np.ndarray:
    """Return a site's update; drawn again when it is needed again, so memory stays flat."""
    rng = np.random.default_rng(site)
    return rng.uniform(-0.5, 0.5, numbers).astype(np.float32)


def run(num_sites: int, numbers: int, num_masked: int | None = None) -> dict[str, Any]:
    """Play one round, or its beginning, and return its figures."""
    clock = Clock()
    identities = {u: Identity.generate() for u in range(num_sites)}
    pinned = {u: identity.public_bytes for u, identity in identities.items()}
    sites = {u: SecureSite(u, identity, pinned, Memory()) for u, identity in identities.items()}
    roster = {u: site.introduce("run") for u, site in sites.items()}
    for site in sites.values():
        clock("roster", lambda site=site: site.accept_roster(roster))
    terms = Terms(1, tuple(sites), FRACTION, digest_of(roster))
    code = FixedPoint(RANGE, num_sites, LARGEST_WEIGHT)
    secure = SecureRound(terms, numbers + 1, b"task")
    up: dict[int, int] = {}
    down = [size({"terms": write(terms)})]
    for u, site in sites.items():
        answer = clock("share", lambda site=site: site.share(terms))
        up[u] = size({"answer": write(answer)})
        clock("take keys", lambda u=u, answer=answer: secure.receive_keys(u, answer))
    deliveries = clock("deliver", secure.deliveries)
    down.append(max(size({"answer": write(delivery)}) for delivery in deliveries.values()))
    weights = {u: 1000 + u for u in sites}
    dropped = set(range(0, num_sites, round(1 / DROPPED)))
    exact, total_weight = np.zeros(numbers), 0
    for u, delivery in list(deliveries.items())[:num_masked]:
        update = update_of(u, numbers)
        words, _ = clock("encode", lambda u=u, x=update: code.encode(x, weights[u]))
        vector = np.concatenate([words, code.encode_counts([weights[u]])])
        clock("mask", lambda u=u, v=vector, d=delivery: sites[u].mask(v, d, task=b"task"))
        if u in dropped:
            continue
        up[u] += len(ArrayRecord({"words": Array(vector)})["words"].data)
        clock("add", lambda u=u, v=vector: secure.receive_vector(u, v))
        exact += weights[u] * update.astype(np.float64)
        total_weight += weights[u]
    figures = {
        "sites": num_sites,
        "numbers": numbers,
        "neighbors": terms.degree,
        "threshold": terms.threshold,
        "extra_downlink_bytes_of_a_site": sum(down),
        "roster_bytes_once_a_run": size({"roster": write(roster)}),
    }
    if num_masked is not None:
        of_site = {what: clock.mean(what) for what in ("share", "encode", "mask")}
        return figures | {"sites_masked": num_masked, "seconds_of_a_site": of_site}
    survivors = secure.survivors()
    for u in survivors:
        signature = clock("confirm", lambda u=u: sites[u].confirm(survivors))
        secure.receive_signature(u, signature)
    signatures = secure.signatures()
    signed = size({"answer": write(signature)})
    told = size({"survivors": write(survivors)})
    told += size({"signatures": write(signatures)})
    for u in survivors:
        reveal = clock("reveal", lambda u=u: sites[u].reveal(signatures))
        up[u] += signed + size({"answer": write(reveal)})
        secure.receive_reveal(u, reveal)
    total = clock("unmask", secure.total)
    assert int(total[-1]) == total_weight
    error = np.abs(code.decode(total[:-1], int(total[-1])) - exact / total_weight).max()
    of_site = {what: clock.mean(what) for what in ("share", "encode", "mask", "confirm", "reveal")}
    figures["extra_downlink_bytes_of_a_site"] += told
    return figures | {
        "dropped_after_sharing": len(dropped),
        "seconds_of_a_site": of_site | {"round": sum(of_site.values())},
        "consistency_round_of_a_site": {
            "uplink_bytes": signed,
            "downlink_bytes": told,
            "seconds": of_site["confirm"] + of_site["reveal"],
        },
        "seconds_of_a_site_once_a_run": clock.mean("roster"),
        "seconds_of_the_coordinator": {
            what: clock.sum(what) for what in ("take keys", "deliver", "add", "unmask")
        },
        "uplink_bytes_of_a_site": max(up[u] for u in survivors),
        "uplink_ratio": max(up[u] for u in survivors) / (4 * numbers),
        "largest_error_over_range": float(error / RANGE),
    }


def main() -> None:
    """Play the rounds that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = [
        "5x65000",
        "10x65000",
        "50x65000",
        "100x65000",
        "500x65000",
        "5x5000000",
        "50x5000000",
        "500x5000000x10",
    ]
    parser.add_argument("--cases", nargs="+", default=cases, help="SITESxNUMBERS[xMASKED]")
    rows = []
    for case in parser.parse_args().cases:
        rows.append(run(*map(int, case.split("x"))))
        record.write("protection_secure_aggregation", {"rounds": rows})


if __name__ == "__main__":
    main()
