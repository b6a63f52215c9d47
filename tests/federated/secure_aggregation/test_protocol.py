"""A whole round: the sum is exact whoever drops out when, and too few sites learn nothing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.federated.secure_aggregation.client import Memory
from fedfora.federated.secure_aggregation.messages import Reveal
from fedfora.federated.secure_aggregation.server import RoundLost, WrongShares
from secagg_world import RUN, TASK, World, plain_sum, random_vectors


def test_the_sum_is_the_plain_sum_to_the_bit():
    world = World(5)
    vectors = random_vectors(world.sites, 1000)
    seen = world.play(world.terms(), vectors)
    assert np.array_equal(seen.total, plain_sum(vectors, world.sites))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_sites_may_drop_out_at_every_point_down_to_the_threshold(data):
    """Absent: before sharing. Silent: no vector. Unsigned: no signature. Mute: no last answer."""
    count = data.draw(st.integers(4, 9))
    world = World(count)
    terms = world.terms()
    everybody = list(world.sites)
    may_go = count - max(terms.min_survivors, terms.threshold + 1)
    gone = data.draw(st.permutations(everybody))[: data.draw(st.integers(0, may_go))]
    kinds = ("absent", "silent", "unsigned", "mute")
    fate = [data.draw(st.sampled_from(kinds)) for _ in gone]
    absent, silent, unsigned, mute = (
        {u for u, f in zip(gone, fate, strict=True) if f == kind} for kind in kinds
    )
    vectors = random_vectors(everybody, 17)
    seen = world.play(terms, vectors, absent, silent, unsigned, mute)
    survivors = set(everybody) - absent - silent
    assert set(seen.survivors) == survivors
    assert np.array_equal(seen.total, plain_sum(vectors, survivors))


def test_a_sparse_graph_gives_the_same_sum_with_drop_outs():
    world = World(40)
    terms = world.terms()
    assert terms.degree < 20
    vectors = random_vectors(world.sites, 50)
    seen = world.play(terms, vectors, absent={3}, silent={10, 31}, mute={20})
    assert np.array_equal(seen.total, plain_sum(vectors, set(world.sites) - {3, 10, 31}))


def test_masks_alone_cancel():
    world = World(6)
    vectors = {u: np.zeros(100, np.uint32) for u in world.sites}
    seen = world.play(world.terms(), vectors)
    assert not seen.total.any()
    assert all(masked.any() for masked in seen.masked.values())


def test_the_keys_of_a_run_serve_all_its_rounds_with_other_sites_each():
    world = World(7)
    for number, drawn in enumerate([range(7), [0, 2, 3, 5], [1, 2, 3, 4, 6]], start=1):
        vectors = random_vectors(drawn, 30, seed=number)
        seen = world.play(world.terms(number, drawn), vectors)
        assert np.array_equal(seen.total, plain_sum(vectors, drawn))


def test_a_site_that_missed_a_round_takes_part_in_the_next():
    world = World(5)
    world.play(world.terms(1), random_vectors(world.sites, 5), silent={4})
    vectors = random_vectors(world.sites, 5, seed=2)
    seen = world.play(world.terms(2), vectors)
    assert np.array_equal(seen.total, plain_sum(vectors, world.sites))


def test_a_restarted_site_makes_a_new_key_and_takes_part_again():
    world = World(5)
    world.play(world.terms(1), random_vectors(world.sites, 5))
    world.sites[2].memory = Memory()
    with pytest.raises(ValueError, match="site 2 has no key for this run: it was restarted"):
        world.sites[2].accept_roster(world.roster)
    world.roster = {**world.roster, 2: world.sites[2].introduce(RUN)}
    for site in world.sites.values():
        site.accept_roster(world.roster)
    vectors = random_vectors(world.sites, 5, seed=2)
    assert np.array_equal(world.play(world.terms(2), vectors).total, plain_sum(vectors, range(5)))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ({"absent": {0, 1}}, "3 of 5 sites shared"),
        ({"absent": {0, 1, 2, 3}}, "1 of 5 sites shared; .* asks for 4"),
        ({"silent": {0, 1}}, "3 of 5 sites sent a vector"),
        ({"unsigned": {0, 1}}, "3 of 5 sites confirmed whose vectors arrived; 4 must"),
        ({"mute": {0, 1}}, "cannot be recovered: 3 shares are needed, there are 2"),
    ],
)
def test_with_too_few_sites_the_round_is_lost_and_says_why(gone, message):
    world = World(5)
    with pytest.raises(RoundLost, match=message):
        world.play(world.terms(), random_vectors(world.sites, 5), **gone)


@pytest.mark.parametrize(("liars", "silent"), [({1}, set()), ({1, 4}, set()), ({2}, {4})])
def test_who_hands_back_wrong_shares_is_named_and_the_sum_is_right(liars, silent):
    world = World(7)
    vectors = random_vectors(world.sites, 5)
    seen = world.confirmed(world.terms(), vectors, silent=silent)
    for u in seen.survivors:
        reveal = world.sites[u].reveal(seen.signatures)
        if u in liars:
            for shares in (reveal.keys, reveal.seeds):
                shares.update(dict.fromkeys(shares, bytes(32)))
        seen.secure_round.receive_reveal(u, reveal)
    assert np.array_equal(seen.secure_round.total(), plain_sum(vectors, seen.survivors))
    assert seen.secure_round.liars == liars


def test_who_is_known_to_lie_is_not_believed_again():
    """Site 8's seed has three wrong shares; two at most can be told from the right ones."""
    world = World(9, 0.51)
    vectors = random_vectors(world.sites, 5)
    seen = world.confirmed(world.terms(), vectors)
    for u in seen.survivors:
        reveal = world.sites[u].reveal(seen.signatures)
        if u in (1, 2):
            reveal.seeds.update(dict.fromkeys(reveal.seeds, bytes(32)))
        if u == 3:
            reveal.seeds[8] = bytes(32)
        seen.secure_round.receive_reveal(u, reveal)
    assert np.array_equal(seen.secure_round.total(), plain_sum(vectors, seen.survivors))
    assert seen.secure_round.liars == {1, 2, 3}


@pytest.mark.parametrize("share", [b"", bytes(31), bytes(10**6)])
def test_a_share_of_another_length_is_none(share):
    world = World(5)
    vectors = random_vectors(world.sites, 5)
    seen = world.confirmed(world.terms(), vectors)
    for u in seen.survivors:
        reveal = world.sites[u].reveal(seen.signatures)
        if u == 1:
            reveal.seeds.update(dict.fromkeys(reveal.seeds, share))
        seen.secure_round.receive_reveal(u, reveal)
    assert np.array_equal(seen.secure_round.total(), plain_sum(vectors, seen.survivors))
    assert not seen.secure_round.liars


def test_who_hands_out_wrong_shares_is_named():
    """Site 4 shares something else than the seed that it masks with."""
    world = World(6)
    seen = world.shared(world.terms(), 5)
    world.sites[4].memory.open_round.seed = bytes(32)
    for u, delivery in seen.deliveries.items():
        vector = np.zeros(5, np.uint32)
        world.sites[u].mask(vector, delivery, task=TASK)
        seen.secure_round.receive_vector(u, vector)
    answer = seen.answers[4]
    seen.secure_round.receive_keys(4, dataclasses.replace(answer, seed_digest=bytes(32)))
    seen.survivors = seen.secure_round.survivors()
    world.confirm(seen)
    for u in seen.survivors:
        seen.secure_round.receive_reveal(u, world.sites[u].reveal(seen.signatures))
    with pytest.raises(WrongShares, match="seed of site 4") as caught:
        seen.secure_round.total()
    assert caught.value.site == 4
    assert not seen.secure_round.liars


@pytest.mark.parametrize("unreadable", [1, 4])
def test_who_seals_shares_that_nobody_can_read_throws_nobody_else_out(unreadable):
    """Up to one neighbor short of the threshold costs nothing; beyond, the site is named."""
    world = World(6)  # of five neighbors four are needed
    vectors = random_vectors(world.sites, 5)
    seen = world.shared(world.terms(), 5)
    for u, delivery in seen.deliveries.items():
        if u != 4 and u < unreadable:
            broken = {**delivery.sealed, 4: bytes(len(delivery.sealed[4]))}
            delivery = dataclasses.replace(delivery, sealed=broken)
        vector = vectors[u].copy()
        world.sites[u].mask(vector, delivery, task=TASK)
        seen.secure_round.receive_vector(u, vector)
    seen.survivors = seen.secure_round.survivors()
    world.confirm(seen)
    for u in seen.survivors:
        seen.secure_round.receive_reveal(u, world.sites[u].reveal(seen.signatures))
    if unreadable == 1:
        assert np.array_equal(seen.secure_round.total(), plain_sum(vectors, seen.survivors))
        return
    with pytest.raises(WrongShares, match="seed of site 4"):
        seen.secure_round.total()


def test_a_wrong_share_with_none_to_spare_is_laid_at_nobodys_door():
    world = World(5)
    seen = world.confirmed(world.terms(), random_vectors(world.sites, 5))
    for u in (0, 1, 2, 4):
        reveal = world.sites[u].reveal(seen.signatures)
        if u == 1:
            reveal.seeds[0] = bytes(32)
        seen.secure_round.receive_reveal(u, reveal)
    with pytest.raises(RoundLost, match="too few"):
        seen.secure_round.total()


@pytest.mark.parametrize(
    "vector", [np.zeros(4, np.uint32), np.zeros(5, np.int64), np.zeros((5, 1), np.uint32)]
)
def test_the_coordinator_refuses_vectors_that_do_not_fit(vector):
    world = World(3)
    seen = world.shared(world.terms(), 5)
    with pytest.raises(ValueError, match="expected 5 words from site 1"):
        seen.secure_round.receive_vector(1, vector)


def test_the_coordinator_takes_one_vector_of_each_site_that_shared():
    world = World(5)
    seen = world.shared(world.terms(), 3, absent={4})
    seen.secure_round.receive_vector(1, np.zeros(3, np.uint32))
    for site in (1, 4, 99):
        with pytest.raises(ValueError, match=f"no vector is expected from site {site}"):
            seen.secure_round.receive_vector(site, np.zeros(3, np.uint32))


def test_the_coordinator_takes_signatures_and_shares_of_sites_in_the_sum_alone():
    world = World(5)
    seen = world.confirmed(world.terms(), random_vectors(world.sites, 5), silent={4})
    for site in (4, 99):
        with pytest.raises(ValueError, match=f"no signature is expected from site {site}"):
            seen.secure_round.receive_signature(site, b"")
        with pytest.raises(ValueError, match=f"no answer is expected from site {site}"):
            seen.secure_round.receive_reveal(site, Reveal({}, {}))
