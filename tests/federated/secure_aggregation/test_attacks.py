"""Attacks by a coordinator that sees, keeps, changes and replays every message."""

import dataclasses
from hashlib import sha256

import numpy as np
import pytest

from fedfora.federated.secure_aggregation import messages
from fedfora.federated.secure_aggregation.crypto import (
    Identity,
    add_mask,
    agree,
    combine,
    new_private_key,
    public_key,
    seal,
    subtract_mask,
)
from fedfora.federated.secure_aggregation.fixed_point import FixedPoint
from fedfora.federated.secure_aggregation.messages import Terms, is_connected, mask_context
from fedfora.federated.secure_aggregation.server import RoundLost, SecureRound
from secagg_world import RUN, TASK, World, plain_sum, random_vectors, roster_of


def correlation(words, update):
    return abs(np.corrcoef(words.view(np.int32).astype(float), update)[0, 1])


@pytest.fixture
def updates():
    """Updates as fixed point, and the numbers they came from."""
    rng = np.random.default_rng(3)
    numbers = {u: rng.normal(0, 0.1, 4000) for u in range(5)}
    code = FixedPoint(1.0, 5, 1)
    return numbers, {u: code.encode(x, 1)[0] for u, x in numbers.items()}


# --- curious: keeps all messages, follows the protocol ---


def test_a_masked_vector_looks_like_noise(updates):
    numbers, words = updates
    world = World(5)
    seen = world.masked(world.terms(), words)
    for u, masked in seen.masked.items():
        assert correlation(masked, numbers[u]) < 0.08  # five standard deviations of no relation
        bytes_ = np.bincount(masked.view(np.uint8), minlength=256)
        chi_square = ((bytes_ - bytes_.mean()) ** 2 / bytes_.mean()).sum()
        assert 150 < chi_square < 380  # 255 expected, standard deviation 23


def test_the_same_update_looks_different_in_every_round(updates):
    _, words = updates
    world = World(5)
    first = world.play(world.terms(1), words).masked[0]
    second = world.play(world.terms(2), words).masked[0]
    assert (first == second).mean() < 0.01


def _weak_mask(seed, size):
    """Flower 1.41's generator: 256 bits folded to 32, here to 12 to keep the test short."""
    folded = 0
    for i in range(0, len(seed), 4):
        folded ^= int.from_bytes(seed[i : i + 4], "little")
    return np.random.RandomState(folded % 2**12).randint(0, 2**32, size, dtype=np.uint32)


def _try_all_seeds(masked, known_word, known_at):
    """Return the vector of the one seed of 2^12 that leaves the known word where it must be."""
    for guess in range(2**12):
        mask = np.random.RandomState(guess).randint(0, 2**32, len(masked), dtype=np.uint32)
        if (masked - mask)[known_at] == known_word:
            return masked - mask
    return None


def test_trying_seeds_breaks_flowers_generator_and_not_ours(updates):
    """The coordinator knows one word of the vector, as Flower's workflow sends the row count in
    clear. With folded seeds that is enough to read the rest."""
    numbers, words = updates
    vector, seed = words[0], new_private_key()
    broken = _try_all_seeds(vector + _weak_mask(seed, len(vector)), vector[-1], -1)
    assert correlation(broken, numbers[0]) > 0.999
    masked = vector.copy()
    add_mask(masked, seed)
    found = _try_all_seeds(masked, vector[-1], -1)
    assert found is None or correlation(found, numbers[0]) < 0.1


def test_seeds_have_256_bits_that_all_matter():
    world = World(5)
    seen = world.shared(world.terms(), 8)
    seeds = {world.sites[u].memory.open_round.seed for u in world.sites}
    keys = {world.sites[u].memory.open_round.private_key for u in world.sites}
    assert {len(secret) for secret in seeds | keys} == {32}
    assert len(seeds | keys) == 10
    masks = []
    for bit in range(256):
        secret = bytearray(seen.answers[0].seed_digest)
        secret[bit // 8] ^= 1 << bit % 8
        mask = np.zeros(2, np.uint32)
        add_mask(mask, bytes(secret))
        masks.append(mask.tobytes())
    assert len(set(masks)) == 256


def test_a_late_vector_of_a_site_declared_gone_stays_hidden(updates):
    """The site's key was rebuilt, so all masks it shares with others can be computed; its own
    seed's mask stays on. Without double masking the late vector would lie open here."""
    numbers, words = updates
    world = World(5)
    seen = world.play(world.terms(), words, silent={4})
    late = seen.masked[4].copy()
    shares = {i: seen.reveals[v].keys[4] for i, v in enumerate(range(4), start=1)}
    private = combine(shares, threshold=3)
    assert public_key(private) == seen.answers[4].key.public
    for v in range(4):
        context = mask_context(seen.secure_round.terms, 4, v, TASK, range(5))
        pair = agree(private, seen.answers[v].key.public, context=context)
        (add_mask if v < 4 else subtract_mask)(late, pair)
    assert correlation(late, numbers[4]) < 0.08
    own = world.sites[4].memory.open_round.seed
    subtract_mask(late, own)
    assert np.array_equal(late, words[4])  # the own seed was indeed all that was missing


def test_no_answer_of_a_round_holds_both_secrets_of_a_site(updates):
    _, words = updates
    world = World(5)
    seen = world.play(world.terms(), words, silent={4})
    for reveal in seen.reveals.values():
        assert not reveal.seeds.keys() & reveal.keys.keys()
        assert 4 not in reveal.seeds


def test_a_share_too_few_opens_nothing(updates):
    _, words = updates
    world = World(5)
    with pytest.raises(RoundLost, match="3 shares are needed, there are 2"):
        world.play(world.terms(), words, mute={2, 3})


def test_the_secrets_of_a_site_take_the_thresholds_shares_and_no_fewer():
    """Else fewer neighbors than the terms say could take its masks off, all by themselves."""
    world = World(5)
    terms = world.terms()
    seen = world.shared(terms, 5)
    for u, delivery in seen.deliveries.items():
        world.sites[u].mask(np.zeros(5, np.uint32), delivery, task=TASK)
    opened, sites = world.sites[0].memory.open_round, enumerate(terms.graph[0], start=1)
    held = {i: world.sites[v].memory.open_round.held[0] for i, v in sites}
    for secret, part in ((opened.seed, slice(32)), (opened.private_key, slice(32, None))):
        shares = {i: both[part] for i, both in held.items()}
        few = {i: shares[i] for i in range(1, terms.threshold)}
        assert combine(shares, threshold=terms.threshold) == secret
        assert combine(few, threshold=len(few)) != secret


# --- differencing: asks again for a sum without one site ---


def test_the_same_round_is_not_opened_a_second_time_without_one_site(updates):
    _, words = updates
    world = World(5)
    world.play(world.terms(), words)
    for u in range(4):
        with pytest.raises(ValueError, match="no open round"):
            world.sites[u].confirm((0, 1, 2, 3))


def test_the_same_round_number_is_not_played_again_with_other_sites(updates):
    _, words = updates
    world = World(5)
    world.play(world.terms(1), words)
    with pytest.raises(ValueError, match="round 1 is requested again"):
        world.sites[0].share(world.terms(1, range(4)))
    world.play(world.terms(3), words)
    with pytest.raises(ValueError, match="round 2 is requested again"):
        world.sites[0].share(world.terms(2, range(4)))


def test_a_site_asked_to_introduce_itself_again_still_refuses_the_rounds_it_answered(updates):
    _, words = updates
    world = World(5)
    world.play(world.terms(1), words)
    world.roster = roster_of([site.introduce(RUN) for site in world.sites.values()])
    for site in world.sites.values():
        site.accept_roster(world.roster)
    with pytest.raises(ValueError, match="round 1 is requested again"):
        world.sites[0].share(world.terms(1, range(4)))
    world.roster = roster_of([site.introduce("run 2") for site in world.sites.values()])
    world.sites[0].accept_roster(world.roster)
    world.sites[0].share(world.terms(1, range(4)))  # another run counts from 1


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        ((0, 1, 2), "3 of 5 sites sent a vector; .* asks for 4"),
        ((0, 1, 2, 2), "3 of 5 sites sent a vector; .* asks for 4"),
        ((0,), "1 of 5 sites"),
        ((1, 2, 3, 4), "not among the sites that were present"),
        ((0, 1, 2, 3, 9), "not among the sites that were present"),
    ],
)
def test_a_question_for_the_sum_of_too_few_is_refused(updates, survivors, message):
    _, words = updates
    world = World(5)
    world.masked(world.terms(), words)
    with pytest.raises(ValueError, match=message):
        world.sites[0].confirm(survivors)


def test_a_site_that_is_told_that_too_few_neighbors_are_left_takes_no_part():
    """In a sparse graph; enough sites are there, but a few hold all that hides its vector."""
    world = World(40)
    terms = world.terms()
    seen = world.shared(terms, 5)
    gone = terms.graph[0][terms.threshold - 1 :]
    left = tuple(u for u in world.sites if u not in gone)
    assert len(left) >= terms.min_survivors
    delivery = seen.deliveries[0]
    few = dataclasses.replace(
        delivery,
        present=left,
        keys={u: key for u, key in delivery.keys.items() if u in left},
        sealed={u: shares for u, shares in delivery.sealed.items() if u in left},
    )
    with pytest.raises(ValueError, match="neighbors of site 0 shared"):
        world.sites[0].mask(np.zeros(5, np.uint32), few, task=TASK)
    world.sites[0].mask(np.zeros(5, np.uint32), delivery, task=TASK)
    with pytest.raises(ValueError, match="neighbors of site 0 sent a vector"):
        world.sites[0].confirm(left)


def test_groups_without_a_bridge_are_refused_by_everybody(monkeypatch):
    """Were the graph in two parts, the sum of each part would show."""
    halves = {u: tuple(v for v in range(8) if v != u and v // 4 == u // 4) for u in range(8)}
    monkeypatch.setattr(messages, "draw_graph", lambda sites, degree, seed: halves)
    monkeypatch.setattr(messages, "share_threshold", lambda degree, fraction: 2)
    world = World(8)
    terms = world.terms()
    seen = SecureRound(terms, 5, TASK)
    for u, site in world.sites.items():
        seen.receive_keys(u, site.share(terms))
    with pytest.raises(RoundLost, match="fall into groups"):
        seen.deliveries()
    monkeypatch.setattr(messages, "is_connected", lambda graph, kept: True)
    deliveries = seen.deliveries()
    monkeypatch.setattr(messages, "is_connected", is_connected)
    with pytest.raises(ValueError, match="fall into groups"):
        world.sites[0].mask(np.zeros(5, np.uint32), deliveries[0], task=TASK)
    monkeypatch.setattr(messages, "is_connected", lambda graph, kept: True)
    for u, delivery in deliveries.items():
        world.sites[u].mask(np.zeros(5, np.uint32), delivery, task=TASK)
    monkeypatch.setattr(messages, "is_connected", is_connected)
    with pytest.raises(ValueError, match="fall into groups"):
        world.sites[0].confirm(tuple(range(8)))


def test_nothing_is_revealed_before_the_vector_is_sent(updates):
    world = World(5)
    world.shared(world.terms(), 10)
    with pytest.raises(ValueError, match="has not sent a vector"):
        world.sites[0].confirm((0, 1, 2, 3, 4))


def test_a_vector_is_masked_once_in_a_round(updates):
    _, words = updates
    world = World(5)
    seen = world.masked(world.terms(), words)
    with pytest.raises(ValueError, match="already been masked"):
        world.sites[0].mask(words[0].copy(), seen.deliveries[0], task=TASK)


@pytest.mark.parametrize("victim", range(5))
def test_sites_that_were_given_another_task_than_one_victim_do_not_uncover_it(victim):
    """All others get a model that they cannot change, so their updates are zero."""
    world = World(5)
    rng = np.random.default_rng(4)
    update = rng.normal(0, 0.1, 4000)
    words, _ = FixedPoint(1.0, 5, 1).encode(update, 1)

    def sum_of(number, others_task):
        seen = world.shared(world.terms(number), 4000)
        for u, delivery in seen.deliveries.items():
            vector = words.copy() if u == victim else np.zeros(4000, np.uint32)
            world.sites[u].mask(vector, delivery, task=TASK if u == victim else others_task)
            seen.secure_round.receive_vector(u, vector)
        seen.survivors = seen.secure_round.survivors()
        world.confirm(seen)
        for u in world.sites:
            seen.secure_round.receive_reveal(u, world.sites[u].reveal(seen.signatures))
        return seen.secure_round.total()

    assert np.array_equal(sum_of(1, TASK), words)  # it would, were the task the same
    assert correlation(sum_of(2, b"a model that cannot learn"), update) < 0.08


# --- in the middle: keys of its own, changed, replayed ---


def test_keys_that_no_site_signed_are_refused():
    world = World(4)
    intruder = Identity.generate()
    forged = intruder.sign(2, public_key(new_private_key()), context=b"run\0" + RUN.encode())
    with pytest.raises(ValueError, match="said to come from site 2 is not signed"):
        world.sites[0].accept_roster({**world.roster, 2: forged})
    unsigned = dataclasses.replace(world.roster[2], signature=bytes(64))
    with pytest.raises(ValueError, match="said to come from site 2 is not signed"):
        world.sites[0].accept_roster({**world.roster, 2: unsigned})


def test_a_site_that_is_not_provisioned_is_refused():
    world = World(4)
    stranger = Identity.generate().sign(9, bytes(32), context=b"run\0" + RUN.encode())
    with pytest.raises(ValueError, match="site 9, which is not provisioned"):
        world.sites[0].accept_roster({**world.roster, 9: stranger})


def test_one_sites_key_in_the_place_of_another_is_refused():
    world = World(4)
    with pytest.raises(ValueError, match="site 2, which is not provisioned"):
        world.sites[0].accept_roster({**world.roster, 2: world.roster[3]})
    moved = dataclasses.replace(world.roster[3], site=2)
    with pytest.raises(ValueError, match="said to come from site 2 is not signed"):
        world.sites[0].accept_roster({**world.roster, 2: moved})


def test_keys_of_an_earlier_run_are_refused():
    world = World(4)
    old = world.roster
    new = roster_of([site.introduce("run 2") for site in world.sites.values()])
    with pytest.raises(ValueError, match="said to come from site 2 is not signed"):
        world.sites[0].accept_roster({**new, 2: old[2]})
    without = {site: key for site, key in new.items() if site != 0}
    for roster in (old, without):
        with pytest.raises(ValueError, match="does not hold the key that site 0 made"):
            world.sites[0].accept_roster(roster)


@pytest.mark.parametrize("forge", ["own key", "replayed", "renamed", "another site's"])
def test_a_rounds_key_that_is_not_its_sites_own_is_refused(forge):
    world = World(5)
    earlier = world.play(world.terms(1), random_vectors(world.sites, 5))
    seen = world.shared(world.terms(2), 5)
    delivery = seen.deliveries[0]
    forged = {
        "own key": dataclasses.replace(delivery.keys[1], public=public_key(new_private_key())),
        "replayed": earlier.answers[1].key,
        "renamed": dataclasses.replace(delivery.keys[2], site=1),
        "another site's": delivery.keys[2],
    }[forge]
    changed = dataclasses.replace(delivery, keys={**delivery.keys, 1: forged})
    with pytest.raises(ValueError, match=r"said to come from site [12] is not signed"):
        world.sites[0].mask(np.zeros(5, np.uint32), changed, task=TASK)


@pytest.mark.parametrize("name", ["keys", "sealed"])
@pytest.mark.parametrize("change", ["one less", "one more"])
def test_a_delivery_that_is_not_of_all_neighbors_that_are_present_is_refused(name, change):
    """Without a neighbor's key its mask would be missing from the vector."""
    world = World(5)
    seen = world.shared(world.terms(), 5)
    delivery = seen.deliveries[0]
    near = dict(getattr(delivery, name))
    if change == "one less":
        del near[1]
    else:
        near[0] = near[1]
    with pytest.raises(ValueError, match="from each present neighbor"):
        world.sites[0].mask(
            np.zeros(5, np.uint32), dataclasses.replace(delivery, **{name: near}), task=TASK
        )
    assert not world.sites[0].memory.open_round.present


@pytest.mark.parametrize("forge", ["changed", "replayed", "another's", "reflected", "short"])
def test_sealed_shares_that_are_not_for_this_round_and_site_are_not_kept(forge):
    world = World(5)
    earlier = world.shared(world.terms(1), 5)
    seen = world.shared(world.terms(2), 5)
    delivery = seen.deliveries[0]
    forged = {
        "changed": delivery.sealed[1][:-1] + b"?",
        "replayed": earlier.answers[1].sealed[0],
        "another's": seen.answers[1].sealed[2],
        "reflected": seen.answers[0].sealed[1],
        "short": seal(world.sites[1]._channel(world.terms(2), 1, 0), bytes(40)),
    }[forge]
    changed = dataclasses.replace(delivery, sealed={**delivery.sealed, 1: forged})
    world.sites[0].mask(np.zeros(5, np.uint32), changed, task=TASK)
    assert world.sites[0].memory.open_round.held.keys() == {2, 3, 4}
    for u in range(1, 5):
        world.sites[u].mask(np.zeros(5, np.uint32), seen.deliveries[u], task=TASK)
    signatures = {u: world.sites[u].confirm(delivery.present) for u in range(5)}
    answer = world.sites[0].reveal(signatures)
    assert answer.seeds.keys() == {2, 3, 4}
    assert not answer.keys


def test_a_coordinator_cannot_tell_sites_that_nobody_else_is_there():
    world = World(5)
    seen = world.shared(world.terms(), 5)
    delivery = seen.deliveries[0]
    for present in [(0,), (0, 1, 2), (1, 2, 3, 4), (0, 1, 2, 3, 9)]:
        near = [v for v in present if v in delivery.keys]
        changed = dataclasses.replace(
            delivery,
            present=present,
            keys={v: delivery.keys[v] for v in near},
            sealed={v: delivery.sealed[v] for v in near},
        )
        with pytest.raises(ValueError, match=r"asks for 4|not those of the round"):
            world.sites[0].mask(np.zeros(5, np.uint32), changed, task=TASK)


def test_a_roster_that_differs_between_sites_ends_the_round():
    world = World(5)
    other = Terms(1, tuple(range(5)), 0.66, sha256(b"another roster").digest())
    with pytest.raises(ValueError, match="another roster"):
        world.sites[0].share(other)


@pytest.mark.parametrize(
    ("participants", "fraction", "message"),
    [
        ((0, 1), 0.66, "at least 3 sites"),
        ((0, 0, 1), 0.66, "different and in order"),
        ((2, 1, 0), 0.66, "different and in order"),
        ((0, 1, 2), 0.5, "--secagg_threshold"),
        ((0, 1, 2), 1.1, "--secagg_threshold"),
    ],
)
def test_terms_that_do_not_protect_are_refused(participants, fraction, message):
    with pytest.raises(ValueError, match=message):
        Terms(1, participants, fraction, b"")


def test_a_site_takes_part_only_where_it_is_named_and_knows_the_others():
    world = World(5)
    with pytest.raises(ValueError, match="not its own"):
        world.sites[0].share(world.terms(1, [1, 2, 3]))
    with pytest.raises(ValueError, match=r"sites \[9\] take part but are not on the roster"):
        world.sites[0].share(world.terms(1, [0, 1, 2, 9]))


def test_a_malicious_site_cannot_hide_in_anothers_place():
    world = World(4)
    seen = SecureRound(world.terms(), 5, TASK)
    own, other = (world.sites[u].share(world.terms()) for u in (0, 1))
    for answer in (
        dataclasses.replace(own, key=other.key),
        dataclasses.replace(own, sealed=other.sealed),
    ):
        with pytest.raises(ValueError, match="not for its neighbors"):
            seen.receive_keys(0, answer)


def test_a_round_after_all_attacks_still_gives_the_sum():
    world = World(5)
    vectors = random_vectors(world.sites, 9)
    with pytest.raises(ValueError, match="not its own"):
        world.sites[0].share(world.terms(1, [1, 2, 3]))
    assert np.array_equal(world.play(world.terms(1), vectors).total, plain_sum(vectors, range(5)))
