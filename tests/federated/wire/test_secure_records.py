"""What secure aggregation sends and remembers survives Flower's records."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedfora.federated.secure_aggregation.client import Memory
from fedfora.federated.secure_aggregation.crypto import SignedKey
from fedfora.federated.secure_aggregation.messages import Delivery, Reveal, RoundKeys, Terms
from fedfora.federated.wire.secure_records import digest_of_task, read, read_words, write
from secagg_world import TASK, World, plain_sum, random_vectors


def test_every_message_of_a_round_survives():
    world = World(5)
    terms = world.terms()
    assert read(Terms, write(terms)) == terms
    assert read(dict[int, SignedKey], write(world.roster)) == world.roster
    seen = world.play(terms, random_vectors(world.sites, 5), silent={2})
    for answer in seen.answers.values():
        assert read(RoundKeys, write(answer)) == answer
    for delivery in seen.deliveries.values():
        assert read(Delivery, write(delivery)) == delivery
    assert read(dict[int, bytes], write(seen.signatures)) == seen.signatures
    for reveal in seen.reveals.values():
        assert read(Reveal, write(reveal)) == reveal


def test_a_site_may_forget_everything_but_its_record_between_any_two_messages():
    world = World(5)
    vectors = random_vectors(world.sites, 9)

    def restart():
        for site in world.sites.values():
            record = write(site.memory)
            site.memory = read(Memory, record)
            assert write(site.memory) == record

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
    assert read(Memory, write(Memory())) == Memory()


TERMS = write(Terms(1, (0, 1, 2), 0.66, b"roster"))
BROKEN = {
    "no JSON": {"json": "{"},
    "too deep": {"json": "[" * 100_000},
    "another type": {"json": "[]"},
    "a field missing": {"json": '{"round_number": 1}'},
    "a field more": {"json": TERMS["json"].replace("{", '{"more": 1, ', 1)},
    "no number": {"json": TERMS["json"].replace("0.66", "NaN")},
    "a number as text": {"json": TERMS["json"].replace("1", '"1"', 1)},
    "a truth for a number": {"json": TERMS["json"].replace("1", "true", 1)},
    "a list as numbers": {"json": TERMS["json"].replace("[0, 1, 2]", "[[0], 1, 2]")},
    "bytes that are not there": {"bytes": []},
    "text as bytes": {"bytes": ["roster"]},
    "too few sites": {"json": TERMS["json"].replace("[0, 1, 2]", "[0]")},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_not_the_expected_value_is_refused(fault):
    with pytest.raises(ValueError, match=r"expects|has \[|at least|Expecting|got nan"):
        read(Terms, ConfigRecord({**TERMS, **BROKEN[fault]}))
    assert read(Terms, TERMS).participants == (0, 1, 2)


GOOD = Array(np.arange(5, dtype=np.uint32))
WRONG_WORDS = {
    "another name": {"numbers": GOOD},
    "one more": {"words": GOOD, "more": GOOD},
    "another dtype": {"words": Array(np.arange(5, dtype=np.int32))},
    "another shape": {"words": Array(np.arange(6, dtype=np.uint32))},
    "two dimensions": {"words": Array(np.zeros((5, 1), np.uint32))},
    "many bytes": {"words": Array("uint32", (5,), GOOD.stype, GOOD.data + bytes(10**6))},
}


@pytest.mark.parametrize("fault", WRONG_WORDS)
def test_what_is_not_the_expected_words_is_refused_before_it_is_read(monkeypatch, fault):
    assert read_words(ArrayRecord({"words": GOOD}), 5).tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(Array, "numpy", None)
    with pytest.raises(ValueError, match="expected"):
        read_words(ArrayRecord(WRONG_WORDS[fault]), 5)


def test_another_base_rule_adapter_or_setting_is_another_task():
    adapter = {"q.A": torch.zeros(2, 3)}
    task = ("core", "base", adapter, {"local_steps": 1})
    others = [
        ("fedavg", *task[1:]),
        ("core", "another", *task[2:]),
        (*task[:2], {"q.A": torch.zeros(3, 2)}, task[3]),
        (*task[:2], {"q.D": torch.zeros(2, 3)}, task[3]),
        (*task[:2], {"q.A": torch.full((2, 3), -0.0)}, task[3]),
        (*task[:3], {"local_steps": 2}),
        (*task[:3], {}),
    ]
    assert digest_of_task(*task) == digest_of_task(*task[:2], {"q.A": torch.zeros(2, 3)}, task[3])
    assert len({digest_of_task(*each) for each in (task, *others)}) == len(others) + 1
