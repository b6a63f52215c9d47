"""The graph: regular, mutual, connected; the number of neighbors keeps what it promises."""

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from fedfora.federated.secure_aggregation.crypto import TAKES_PART, SignedKey
from fedfora.federated.secure_aggregation.messages import (
    COLLUDING,
    DROPPED,
    Terms,
    choose_degree,
    digest_of,
    draw_graph,
    is_connected,
    mask_context,
    pair_context,
    round_context,
    run_context,
    share_threshold,
    survivors_context,
)


@given(st.integers(4, 60), st.data())
def test_neighbors_are_mutual_regular_and_everybody_is_reached(count, data):
    degree = data.draw(st.sampled_from([*range(2, count - 1, 2), count - 1]))
    sites = tuple(data.draw(st.permutations(range(100, 100 + count))))
    graph = draw_graph(sites, degree, b"seed")
    assert set(graph) == set(sites)
    for u, neighbors in graph.items():
        assert len(set(neighbors)) == degree
        assert list(neighbors) == sorted(neighbors)
        assert u not in neighbors
        assert all(u in graph[v] for v in neighbors)
    assert is_connected(graph, sites)
    assert graph == draw_graph(tuple(sorted(sites)), degree, b"seed")


def test_another_seed_draws_another_graph():
    graphs = [draw_graph(range(50), 6, bytes([i])) for i in range(20)]
    assert len({graph[0] for graph in graphs}) > 15


@pytest.mark.parametrize(("count", "degree"), [(10, 3), (10, 0), (10, 10), (10, 12)])
def test_degrees_that_no_graph_has_are_refused(count, degree):
    with pytest.raises(ValueError, match="neighbors each"):
        draw_graph(range(count), degree, b"seed")


def test_parts_without_a_bridge_are_not_connected():
    ring = draw_graph(range(12), 2, b"seed")
    a = 0
    b = ring[0][0]
    assert is_connected(ring, {a, b})
    far = next(u for u in ring if u not in {a, *ring[a]})
    assert not is_connected(ring, {a, far})
    assert is_connected(ring, set())


@pytest.mark.parametrize("degree", range(2, 40))
@pytest.mark.parametrize("fraction", [0.5, 0.51, 2 / 3, 0.9, 1.0])
def test_a_threshold_is_more_than_half_and_no_more_than_all(degree, fraction):
    assert degree / 2 < share_threshold(degree, fraction) <= degree


def test_few_sites_all_know_each_other_and_many_do_not():
    assert [choose_degree(n, 0.66) for n in (3, 5, 10, 32)] == [2, 4, 9, 31]
    degrees = [choose_degree(n, 0.66) for n in (40, 100, 500, 1000)]
    assert degrees == sorted(degrees)
    assert degrees[-1] < 100


def test_drawn_sites_keep_the_promise_of_the_degree():
    """300 drawn rounds with the stated shares of colluders and of drop-outs: no site is exposed or
    left with too few neighbors, as the bound (below 2^-20 for one round) says."""
    count, rng = 200, random.Random(1)
    degree = choose_degree(count, 0.66)
    threshold = share_threshold(degree, 0.66)
    for number in range(300):
        graph = draw_graph(range(count), degree, number.to_bytes(4, "big"))
        colluding = set(rng.sample(range(count), int(COLLUDING * count)))
        dropped = set(rng.sample(range(count), int(DROPPED * count)))
        for neighbors in graph.values():
            assert len(colluding.intersection(neighbors)) < 2 * threshold - degree
            assert len(set(neighbors) - dropped) >= threshold


@pytest.mark.parametrize("fraction", [0.6, 0.66, 0.75])
@pytest.mark.parametrize("count", [33, 40, 70, 100, 200, 500, 1000])
def test_no_fewer_neighbors_are_chosen_than_both_bounds_allow(count, fraction):
    """By scipy's tails: the bounds are far below what drawn rounds could show."""
    others, degree = count - 1, choose_degree(count, fraction)
    spare = degree - share_threshold(degree, fraction)
    colluding, dropped = (math.ceil(share * others) for share in (COLLUDING, DROPPED))
    insecure = hypergeom.sf(degree - 2 * spare - 1, others, colluding, degree)
    incomplete = hypergeom.sf(spare, others, dropped, degree)
    assert count * insecure < 2**-40
    assert count * incomplete < 2**-20


# What a signature, a seal or a mask is made for differs wherever one thing about it does.


KEYS = {u: SignedKey(u, bytes([u]) * 32, b"") for u in range(4)}
TERMS = Terms(1, (0, 1, 2), 0.66, digest_of(KEYS))


@pytest.mark.parametrize(
    "other",
    [
        {"round_number": 2},
        {"participants": (0, 1, 3)},
        {"participants": (0, 1, 2, 3)},
        {"fraction": 0.67},
        {"roster_digest": digest_of({u: KEYS[u] for u in range(3)})},
        {"roster_digest": digest_of({**KEYS, 3: KEYS[2]})},
        {"roster_digest": digest_of({0: KEYS[0], 1: KEYS[2], 2: KEYS[1], 3: KEYS[3]})},
        {"roster_digest": digest_of({**{u: KEYS[u] for u in range(3)}, 4: KEYS[3]})},
    ],
)
def test_other_terms_are_other_contexts_for_all_that_is_signed_sealed_and_masked(other):
    terms = dataclasses.replace(TERMS, **other)
    for context in (
        round_context,
        survivors_context,
        lambda terms: pair_context(terms, b"shares", 0, 1),
        lambda terms: mask_context(terms, 0, 1, b"task", (0, 1, 2)),
    ):
        assert context(terms) != context(TERMS)


def test_no_context_is_one_of_another_purpose_run_or_pair():
    contexts = [
        *(run_context("1"), run_context("2"), run_context(""), TAKES_PART),
        *(round_context(TERMS), survivors_context(TERMS)),
        *(pair_context(TERMS, b"shares", *pair) for pair in ((0, 1), (1, 0), (0, 2), (2, 1))),
        *(mask_context(TERMS, *pair, b"task", (0, 1, 2)) for pair in ((0, 1), (0, 2), (1, 2))),
        mask_context(TERMS, 0, 1, b"other", (0, 1, 2)),
        *(mask_context(TERMS, 0, 1, b"task", present) for present in ((0, 1), (0, 3))),
    ]
    assert len(set(contexts)) == len(contexts)
    words = {context.partition(b"\0")[0] for context in contexts}
    assert words == {b"run", b"round", b"survivors", b"takes part", b"shares", b"mask"}
    assert mask_context(TERMS, 0, 1, b"", (2, 1)) == mask_context(TERMS, 1, 0, b"", (1, 2))
