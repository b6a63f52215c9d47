"""Laws that every registered rule obeys, alone and with every robust combination."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfora.federated.aggregation import ROBUST, RULES
from fedfora.federated.aggregation.robust import robust
from fedfora.federated.aggregation.update import absorb, part, rank_of, truncate

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FIXTURE = HealthCheck.function_scoped_fixture  # it holds functions alone
ROBUSTLY = ["none", *ROBUST]


class Federation:
    """A rule with a global adapter and sites as the rule makes them: frozen factors are shared."""

    def __init__(self, adapters, name, how="none"):
        self.rule, self.adapters = RULES[name], adapters
        self.combine = robust(how, 1)
        self.before = self._prepared(adapters.random(100))

    def site(self, seed, **options):
        own = self._prepared(self.adapters.random(seed, **options))
        return {**own, **part(self.before, self.rule.frozen)}

    def aggregate(self, pairs):
        """The whole adapter that comes out."""
        sent = ((part(update, self.rule.travels), weight) for update, weight in pairs)
        current = part(self.before, self.rule.travels)
        result = self.rule.aggregate(current, sent, self.combine)
        kept = part(self.before, self.rule.frozen)
        return {**kept, **result}

    def _prepared(self, update):
        if not self.rule.absorbs:
            return update
        return part(absorb(update), "AD")


@pytest.fixture(params=[(rule, how) for rule in RULES for how in ROBUSTLY], ids="+".join)
def federation(request, adapters):
    return Federation(adapters, *request.param)


def test_identical_clients_are_a_fixed_point(federation, adapters):
    site = federation.site(0)
    result = federation.aggregate([(site, w) for w in (1.0, 5.0, 2.5, 1.0, 1.0)])
    expected = {layer: adapters.dense(site, layer) for layer in "qv"}
    for layer in "qv":
        torch.testing.assert_close(adapters.dense(result, layer), expected[layer], **CLOSE)


def test_the_order_of_clients_does_not_matter(federation, adapters):
    pairs = [(federation.site(k), 1.0 + k) for k in range(5)]
    shuffled = [pairs[k] for k in (3, 0, 4, 2, 1)]
    adapters.assert_same(federation.aggregate(pairs), federation.aggregate(shuffled), **CLOSE)


def test_weights_count_only_in_proportion(federation, adapters):
    pairs = [(federation.site(k), 1.0 + k) for k in range(4)]
    scaled = [(update, 1000 * w) for update, w in pairs]
    adapters.assert_same(federation.aggregate(pairs), federation.aggregate(scaled), **CLOSE)


def test_inputs_are_not_modified(federation):
    updates = [federation.site(k) for k in range(4)]
    before = [{name: value.clone() for name, value in update.items()} for update in updates]
    federation.aggregate([(update, 1.0) for update in updates])
    for old, new in zip(before, updates, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_results_are_float32_whatever_came_in(federation):
    halves = {name: value.half() for name, value in federation.site(0).items()}
    result = federation.aggregate([(halves, 1.0)] * 4)
    sent = part(result, federation.rule.travels)
    assert {value.dtype for value in sent.values()} == {torch.float32}


def test_a_stream_of_updates_is_enough(federation, adapters):
    pairs = [(federation.site(k), 1.0) for k in range(4)]
    adapters.assert_same(federation.aggregate(iter(pairs)), federation.aggregate(pairs))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(federation, weight):
    with pytest.raises(ValueError, match="positive and finite"):
        federation.aggregate([(federation.site(0), weight)])


def test_nobody_is_refused(federation):
    with pytest.raises(ValueError, match="no site sent an update"):
        federation.aggregate([])


@pytest.mark.parametrize("name", ["core", "ffa", "refactor"])
def test_exact_rules_give_the_dense_mean(name, adapters):
    """`refactor` where the mean has the rank, as for sites that differ in D K alone."""
    federation = Federation(adapters, name)
    sites = [federation.site(k) for k in range(4)]
    if name == "refactor":
        sites = [{**site, **part(sites[0], "A")} for site in sites]
    pairs = [(site, 1.0 + k) for k, site in enumerate(sites)]
    result = federation.aggregate(pairs)
    for layer in "qv":
        expected = adapters.mean(pairs, layer)
        torch.testing.assert_close(adapters.dense(result, layer), expected, **CLOSE)


def test_averaging_factors_is_not_the_mean_update(adapters):
    federation = Federation(adapters, "fedavg")
    pairs = [(federation.site(k), 1.0) for k in range(3)]
    mean = adapters.mean(pairs)
    assert (adapters.dense(federation.aggregate(pairs)) - mean).norm() > 0.3 * mean.norm()


def test_fedavg_by_hand():
    updates = [({"p.A": torch.tensor([1.0])}, 3.0), ({"p.A": torch.tensor([5.0])}, 1.0)]
    assert RULES["fedavg"].aggregate({}, updates, None)["p.A"].item() == 2.0  # (3 * 1 + 1 * 5) / 4


def test_one_client_is_taken_over_to_the_bit_by_fedavg(adapters):
    update = adapters.random(0)
    result = RULES["fedavg"].aggregate({}, [(update, 12345.0)], None)
    assert all(torch.equal(result[name], update[name]) for name in update)


@settings(deadline=None, max_examples=20, suppress_health_check=[FIXTURE])
@given(weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=40))
def test_refactor_is_the_best_rank_r_approximation_of_the_dense_mean(adapters, weights):
    """Against torch's SVD of the dense matrix (Eckart and Young); 40 sites outgrow any rank."""
    pairs = [(adapters.random(k), w) for k, w in enumerate(weights)]
    result = RULES["refactor"].aggregate(adapters.random(0), pairs, None)
    U, S, Vh = torch.linalg.svd(adapters.mean(pairs))
    rank = rank_of(result)
    best = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
    torch.testing.assert_close(adapters.dense(result), best, **CLOSE)


def test_sites_may_have_different_ranks(adapters):
    federation = Federation(adapters, "refactor")
    pairs = [(federation.site(k, rank=rank), 1.0) for k, rank in enumerate((1, 2, 1))]
    result = federation.aggregate(pairs)
    expected = adapters.mean(pairs)  # of rank 4: one more than the global adapter's
    U, S, Vh = torch.linalg.svd(expected)
    expected = U[:, :3] @ torch.diag(S[:3]) @ Vh[:3]
    torch.testing.assert_close(adapters.dense(result), expected, **CLOSE)


def test_a_truncated_adapter_is_the_closest_of_its_rank(adapters):
    pairs = [(adapters.random(k), 1.0) for k in range(3)]
    whole = RULES["refactor"].aggregate(adapters.random(0), pairs, None)
    U, S, Vh = torch.linalg.svd(adapters.dense(whole))
    cut = truncate(whole, 2)
    assert cut["q.A"].shape == (2, 9)
    torch.testing.assert_close(adapters.dense(cut), U[:, :2] @ torch.diag(S[:2]) @ Vh[:2], **CLOSE)


def test_taking_the_core_into_d_changes_no_function(adapters):
    for factors in ("ADE", "ABCDE"):
        update = adapters.random(0, factors=factors)
        adapters.assert_same(absorb(update), update, **CLOSE)


@pytest.mark.parametrize("name", list(RULES))
def test_every_factor_has_one_place(name):
    rule = RULES[name]
    places = rule.travels + rule.frozen
    assert len(set(places)) == len(places)
    assert set(places) | ({"E"} if rule.absorbs else set()) == set("ADE")


def test_an_unknown_rule_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'fedavg'"):
        RULES["fedavgg"]
