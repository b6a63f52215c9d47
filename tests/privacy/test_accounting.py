"""The ledger against dp-accounting's own numbers and against closed forms."""

import json
import math
import random
from dataclasses import dataclass

import pytest
from scipy.optimize import brentq
from scipy.stats import beta, binom, norm

from fedfora.privacy.accounting import Release, epsilon_of, epsilon_shown, noise_multiplier_for
from fedfora.privacy.ledger import BudgetSpent, Ledger

DELTA = 1e-5


def gaussian_epsilon(sigma, delta):
    """Exact epsilon of one Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, Thm. 8)."""

    def delta_at(eps):
        a, b = 1 / (2 * sigma), eps * sigma
        return norm.cdf(a - b) - math.exp(eps) * norm.cdf(-a - b)

    return brentq(lambda eps: delta_at(eps) - delta, 1e-9, 100)


@pytest.mark.parametrize(("sigma", "count"), [(1.0, 1), (4.0, 1), (8.0, 30), (2.0, 5)])
def test_whole_batches_have_the_gaussian_mechanisms_epsilon(sigma, count):
    """`count` releases at sigma are one at sigma / sqrt(count)."""
    found = epsilon_of([Release(1.0, sigma, count)], DELTA)
    assert found == pytest.approx(gaussian_epsilon(sigma / math.sqrt(count), DELTA), rel=2e-3)


@dataclass(frozen=True)
class OtherRelease(Release):
    """Of another mechanism, whose parameters have the same numbers."""

    mechanism: str = "other"


def test_releases_of_two_mechanisms_are_never_counted_as_one():
    ledger = Ledger(DELTA)
    for release in (Release, OtherRelease, OtherRelease, Release):
        ledger.spend(release(1.0, 2.0, 3))
    assert ledger.releases == [
        Release(1.0, 2.0, 3),
        OtherRelease(1.0, 2.0, 6),
        Release(1.0, 2.0, 3),
    ]


def test_sampled_batches_have_dp_accountings_epsilon():
    """Opacus' tutorial setting: q = 256/60000, sigma 1.1, 60 epochs; RDP says 2.92 or so."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    q, sigma, count = 256 / 60000, 1.1, 1000
    event = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(sigma))
    own = PLDAccountant().compose(event, count).get_epsilon(DELTA)
    found = epsilon_of([Release(q, sigma, count)], DELTA)
    assert found == own
    assert found < RdpAccountant().compose(event, count).get_epsilon(DELTA)


def test_composition_does_not_depend_on_how_it_is_cut():
    whole = epsilon_of([Release(0.05, 1.2, 40)], DELTA)
    parts = [Release(0.05, 1.2, 10), Release(0.05, 1.2, 29), Release(0.05, 1.2, 1)]
    assert epsilon_of(parts, DELTA) == pytest.approx(whole, rel=1e-6)
    assert epsilon_of([], DELTA) == 0
    assert epsilon_of([Release(0.05, 0.0, 1)], DELTA) == math.inf


def test_releases_of_other_rates_and_noise_compose_as_dp_accounting_composes_them():
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    parts = ((0.05, 1.2, 10), (0.2, 2.0, 3), (1.0, 8.0, 2), (0.05, 1.2, 5))
    own = PLDAccountant()
    for rate, noise, count in parts:
        own.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), count)
    found = epsilon_of([Release(*part) for part in parts], DELTA)
    assert found == pytest.approx(own.get_epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize("part", [(0.0, 1.0, 1), (1.01, 1.0, 1), (0.5, -1.0, 1), (0.5, 1.0, 0)])
def test_a_release_that_cannot_be_is_refused(part):
    """Whoever writes a ledger: a count of -9 would give steps back."""
    with pytest.raises(ValueError, match="must"):
        Release(*part)


@pytest.mark.parametrize("target", [1.0, 8.0])
def test_the_chosen_noise_spends_the_budget_and_no_more(target):
    chosen = noise_multiplier_for(target_epsilon=target, delta=DELTA, sampling_rate=0.1, count=60)
    assert epsilon_of([Release(0.1, chosen, 60)], DELTA) <= target
    assert epsilon_of([Release(0.1, chosen * 0.99, 60)], DELTA) > target


def test_more_noise_fewer_steps_and_smaller_samples_all_spend_less():
    base = epsilon_of([Release(0.1, 1.0, 20)], DELTA)
    for less in (Release(0.1, 1.1, 20), Release(0.1, 1.0, 19), Release(0.09, 1.0, 20)):
        assert epsilon_of([less], DELTA) < base


def test_the_step_beyond_the_budget_is_refused_and_nothing_is_entered(tmp_path):
    ledger = Ledger.open(tmp_path / "site" / "ledger.json", delta=DELTA, target_epsilon=2.0)
    step = Release(0.1, 1.5, 10)
    while True:
        try:
            ledger.spend(step)
        except BudgetSpent as error:
            text = str(error)
            break
    spent = sum(release.count for release in ledger.releases)
    assert ledger.epsilon <= 2.0
    assert "--target_epsilon is 2" in text
    left = ledger.left(step)
    assert epsilon_of([Release(0.1, 1.5, spent + left)], DELTA) <= 2.0
    assert epsilon_of([Release(0.1, 1.5, spent + left + 1)], DELTA) > 2.0
    again = Ledger.open(ledger.path, delta=DELTA, target_epsilon=2.0)
    assert again.releases == ledger.releases
    with pytest.raises(BudgetSpent):
        again.spend(step)


def test_a_resumed_ledger_composes_with_what_was_spent(tmp_path):
    path = tmp_path / "ledger.json"
    Ledger.open(path, delta=DELTA, target_epsilon=None).spend(Release(0.1, 2.0, 5))
    resumed = Ledger.open(path, delta=DELTA, target_epsilon=None)
    resumed.spend(Release(0.1, 2.0, 7))
    resumed.spend(Release(0.2, 2.0, 1))
    assert resumed.releases == [Release(0.1, 2.0, 12), Release(0.2, 2.0, 1)]
    stored = json.loads(path.read_text())
    assert stored["epsilon"] == pytest.approx(epsilon_of(resumed.releases, DELTA))


@pytest.mark.parametrize("text", ["", "{}", '{"releases": [{"sampling_rate": 2}]}', "[1]"])
def test_a_broken_ledger_is_refused(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a privacy ledger"):
        Ledger.open(path, delta=DELTA, target_epsilon=1.0)


@pytest.mark.parametrize(("correct", "guesses"), [(24, 24), (60, 80), (90, 100), (700, 1000)])
def test_without_delta_the_epsilon_shown_is_that_of_clopper_and_pearson(correct, guesses):
    right = beta.ppf(0.05, correct, guesses - correct + 1)
    reference = math.log(right / (1 - right))
    assert epsilon_shown(correct, guesses, 0.0) == pytest.approx(reference, abs=1e-3)


def p_value(guesses, correct, epsilon, delta):
    """Of Theorem 5.2 as its authors' own code computes it: from a sum of probabilities."""
    q = 1 / (1 + math.exp(-epsilon))
    beta_, alpha, tail = binom.sf(correct - 1, guesses, q), 0.0, 0.0
    for i in range(1, correct + 1):
        tail += binom.pmf(correct - i, guesses, q)
        alpha = max(alpha, tail / i)
    return beta_ + 2 * guesses * delta * alpha


@pytest.mark.parametrize("delta", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize(("correct", "guesses"), [(24, 24), (60, 80), (98, 100)])
def test_with_delta_the_epsilon_shown_is_that_of_its_authors(correct, guesses, delta):
    shown = epsilon_shown(correct, guesses, delta)
    assert shown > 0
    assert p_value(guesses, correct, shown, delta) == pytest.approx(0.05, rel=0.01)


def test_guesses_no_better_than_chance_show_nothing_and_delta_shows_less():
    assert epsilon_shown(50, 100, 0.0) == epsilon_shown(0, 10, 0.0) == 0
    shown = [epsilon_shown(98, 100, delta) for delta in (0.0, 1e-5, 1e-3, 1e-2)]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > shown[-1]


def test_randomized_response_is_refuted_no_more_often_than_stated():
    rng, epsilon = random.Random(0), 1.0
    truth = 1 / (1 + math.exp(-epsilon))
    runs = [sum(rng.random() < truth for _ in range(100)) for _ in range(400)]
    refuted = sum(epsilon_shown(correct, 100, 0.0) > epsilon for correct in runs)
    assert refuted / len(runs) < 0.08
    assert max(epsilon_shown(correct, 100, 0.0) for correct in runs) > 0.8 * epsilon
