"""Each row goes to exactly one client, the same one every time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.data.loading import DataError, Example
from fedfora.data.partition import partition


def rows(n):
    return [Example("", "x", "y", {"kind": "abc"[i % 3], "n": i}) for i in range(n)]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 60), clients=st.integers(1, 10), seed=st.integers(0, 5))
def test_iid_shares_out_every_row_once(n, clients, seed):
    if clients > n:
        return
    parts = partition(rows(n), "iid", num_clients=clients, seed=seed)
    assert len(parts) == clients
    assert sorted(i for part in parts.values() for i in part) == list(range(n))
    sizes = [len(part) for part in parts.values()]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("alpha", ["0.3", "100"])
def test_dirichlet_shares_out_every_row_once_and_is_seeded(alpha):
    how = f"dirichlet:kind:{alpha}"
    parts = partition(rows(90), how, num_clients=4, seed=1)
    assert sorted(i for part in parts.values() for i in part) == list(range(90))
    assert parts == partition(rows(90), how, num_clients=4, seed=1)
    assert parts != partition(rows(90), how, num_clients=4, seed=2)


def test_by_column_makes_one_client_for_each_value():
    parts = partition(rows(7), "by-column:kind", num_clients=None, seed=0)
    assert parts == {"a": [0, 3, 6], "b": [1, 4], "c": [2, 5]}


def test_small_sites_join_the_site_that_has_their_name_already():
    kinds = ["a", "b", *["small sites"] * 5, "c", "c"]
    examples = [Example("", "x", "y", {"kind": kind}) for kind in kinds]
    parts = partition(examples, "by-column:kind", num_clients=None, seed=0, min_rows=2)
    assert parts == {"small sites": [0, 1, 2, 3, 4, 5, 6], "c": [7, 8]}


def test_a_sites_name_from_a_column_is_one_that_no_terminal_obeys():
    examples = [Example("", "x", "y", {"kind": kind}) for kind in ("\x1b[2J\n", "心内科")]
    parts = partition(examples, "by-column:kind", num_clients=None, seed=0)
    assert parts == {"\\x1b[2J\\n": [0], "心内科": [1]}


@pytest.mark.parametrize(
    ("how", "clients", "message"),
    [
        ("iidd", 2, "'iidd' is not one of"),
        ("dirichlet:kind", 2, "is not one of"),
        ("dirichlet:kind:0", 2, "ALPHA must be a number above 0, got '0'"),
        ("dirichlet:kind:x", 2, "ALPHA must be a number above 0, got 'x'"),
        ("iid", None, "needs --num_clients"),
        ("iid", 8, "--num_clients 8: only 7 rows"),
        ("by-column:kind", 4, "makes 3 clients, but --num_clients is 4"),
        ("by-column:type", None, 'row 1 has no column "type"; it has: kind, n'),
    ],
)
def test_an_impossible_partition_is_refused(how, clients, message):
    with pytest.raises(DataError, match=message):
        partition(rows(7), how, num_clients=clients, seed=0)
