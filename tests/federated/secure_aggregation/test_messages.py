"""The graph: regular, mutual, connected; the number of neighbors keeps what it promises."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfora.federated.secure_aggregation.messages import (
    COLLUDING,
    DROPPED,
    choose_degree,
    draw_graph,
    is_connected,
    share_threshold,
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
