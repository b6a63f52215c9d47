"""What secure aggregation sends and remembers survives Flower's records."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedfora.federated.secure_aggregation.client import Memory
from fedfora.federated.wire.secure_records import (
    read_delivery,
    read_keys,
    read_memory,
    read_reveal,
    read_round_keys,
    read_signatures,
    read_terms,
    write_delivery,
    write_keys,
    write_memory,
    write_reveal,
    write_round_keys,
    write_signatures,
    write_terms,
)
from secagg_world import TASK, World, plain_sum, random_vectors


def test_every_message_of_a_round_survives():
    world = World(5)
    terms = world.terms()
    assert read_terms(write_terms(terms)) == terms
    assert read_keys(write_keys(world.roster)) == world.roster
    seen = world.play(terms, random_vectors(world.sites, 5), silent={2})
    for answer in seen.answers.values():
        assert read_round_keys(write_round_keys(answer)) == answer
    for delivery in seen.deliveries.values():
        assert read_delivery(write_delivery(delivery)) == delivery
    assert read_signatures(write_signatures(seen.signatures)) == seen.signatures
    for reveal in seen.reveals.values():
        assert read_reveal(write_reveal(reveal)) == reveal


def test_a_site_may_forget_everything_but_its_record_between_any_two_messages():
    world = World(5)
    vectors = random_vectors(world.sites, 9)

    def restart():
        for site in world.sites.values():
            record = write_memory(site.memory)
            site.memory = read_memory(record)
            assert write_memory(site.memory) == record

    restart()
    seen = world.shared(world.terms(), 9)
    restart()
    for u, delivery in seen.deliveries.items():
        world.sites[u].mask(vectors[u], delivery, task=TASK)
    restart()
    plain = random_vectors(world.sites, 9)
    for u in range(4):
        seen.secure_round.receive_vector(u, vectors[u])
    seen.survivors = seen.secure_round.survivors()
    world.confirm(seen)
    restart()
    for u in range(4):
        seen.secure_round.receive_reveal(u, world.sites[u].reveal(seen.signatures))
    assert np.array_equal(seen.secure_round.total(), plain_sum(plain, range(4)))
    restart()
    assert world.sites[0].memory.last_round == 1


def test_an_empty_memory_survives():
    assert read_memory(write_memory(Memory())) == Memory()


@pytest.mark.parametrize(
    ("sites", "joined"), [([1, 2], b"abc"), ([1, 1], b"abcd"), ([], b"a"), ([1], bytes(95))]
)
def test_pieces_that_cannot_be_shared_out_are_refused(sites, joined):
    with pytest.raises(ValueError, match="pieces of equal length"):
        read_keys(ConfigRecord({"sites": sites, "bytes": joined}))
