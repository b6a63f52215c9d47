"""Whatever is asked in whatever order, and wherever the power goes: what left is in the ledger."""

import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfora.privacy.accounting import Release, epsilon_of, noise_multiplier_for
from fedfora.privacy.ledger import BudgetSpent, Ledger, Line, record_statement, site_statement
from fedfora.privacy.settings import PrivacyArguments
from fedfora.training.privacy_plan import plan_private_training
from fedfora.training.settings import TrainArguments

DELTA = 1e-5


@dataclass(frozen=True)
class WithMechanism(Release):
    """A release as a later version may write it."""

    mechanism: str = "normal"


ASKED = st.fixed_dictionaries(
    {
        "run": st.sampled_from(["one", "two"]),
        "round": st.integers(0, 2),
        "num_rounds": st.sampled_from([1, 3]),
        "local_steps": st.sampled_from([1, 4]),
        "batch": st.sampled_from([5, 10]),
        "ends": st.sampled_from(["answered", "killed after it paid", "killed before it paid"]),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ASKED, max_size=6))
def test_no_answer_leaves_that_the_ledger_does_not_hold(tmp_path_factory, asked):
    """As a site does it: plan, pay, train, answer; every process opens the ledger anew."""
    directory = tmp_path_factory.mktemp("ledger")
    arguments = PrivacyArguments(
        privacy_unit="record", target_epsilon=2.0, privacy_dir=str(directory)
    )
    left: Counter[Release] = Counter()
    for ask in asked:
        try:
            training = plan_private_training(
                arguments,
                TrainArguments(per_device_train_batch_size=ask["batch"]),
                output_dir=ask["run"],
                ledger="site-000",
                num_rows=100,
                first_step=ask["round"] * ask["local_steps"],
                total_steps=ask["num_rounds"] * ask["local_steps"],
            )
            if ask["ends"] == "killed before it paid":
                continue
            training.pay(ask["local_steps"], round=ask["round"])
        except BudgetSpent:
            continue
        if ask["ends"] == "answered":
            left[training.release(1)] += ask["local_steps"]
    path = directory / "site-000.json"
    ledger = Ledger.open(path, delta=DELTA, target_epsilon=2.0)
    entered: Counter[Release] = Counter()
    for release in ledger.releases:
        entered[Release(release.sampling_rate, release.noise_multiplier, 1)] += release.count
    assert left <= entered
    answers = [Release(r.sampling_rate, r.noise_multiplier, count) for r, count in left.items()]
    assert epsilon_of(answers, DELTA) <= ledger.epsilon <= 2.0


def test_two_processes_with_one_ledger_spend_one_budget(tmp_path):
    """Both open it empty; the second still sees what the first has entered."""
    path = tmp_path / "ledger.json"
    one, other = (Ledger.open(path, delta=DELTA, target_epsilon=2.0) for _ in range(2))
    release = Release(0.1, 1.5, 20)
    one.spend(release, run="one")
    with pytest.raises(BudgetSpent, match="is spent by one"):
        other.spend(replace(release, count=200), run="other")
    other.spend(replace(release, count=1), run="other")
    with pytest.raises(BudgetSpent, match=r"not allow 1 more step: .*; such steps left: 0$"):
        other.check(Release(1.0, 0.5, 1))
    again = Ledger.open(path, delta=DELTA, target_epsilon=2.0)
    assert again.lines == other.lines
    assert again.runs[0] == "one"


@pytest.mark.parametrize(
    "other",
    [
        {"release": Release(0.2, 1.5, 2)},
        {"release": Release(0.1, 1.4, 2)},
        {"run": "two"},
        {"settings": {"round": 2}},
    ],
)
def test_only_releases_that_are_alike_in_everything_share_a_line(other):
    one = {"release": Release(0.1, 1.5, 3), "run": "one", "settings": {"round": 1}}
    ledger = Ledger(DELTA)
    for spent in (one, one, one | other):
        ledger.spend(**spent)
    together = {**one, "release": Release(0.1, 1.5, 6)}
    assert ledger.lines == [Line(**together), Line(**one | other)]


def test_the_sentence_says_what_the_ledger_holds():
    """Epsilon by dp-accounting's own composition, of a record left out and of one replaced."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    ledger, found = Ledger(DELTA), []
    spent = [Release(0.1, 2.0, 5), Release(0.1, 1.5, 6), Release(0.2, 1.8, 1)]
    for release, run in zip(spent, ["/b/two", "/a/one", "/b/two"], strict=True):
        ledger.spend(release, run=run)
    for relation in ("ADD_OR_REMOVE_ONE", "REPLACE_ONE"):
        own = PLDAccountant(neighboring_relation=dp.NeighboringRelation[relation])
        for r in spent:
            event = dp.GaussianDpEvent(r.noise_multiplier)
            own.compose(dp.PoissonSampledDpEvent(r.sampling_rate, event), r.count)
        found.append(f"{own.get_epsilon(DELTA):.2f}")
    assert found[0] != found[1]
    said = record_statement(ledger, clipping_norm=0.5, num_rows=1200)
    level = f"has ({found[0]}, 1e-05)-differential privacy ({{}} replaced by an empty one; "
    level += f"by any other one, epsilon is {found[1]}) against "
    assert said.startswith("Each of the 1,200 training records " + level.format("one record"))
    assert ": 12 steps in 2 runs (two, one) of DP-SGD " in said
    assert "gradients clipped to 0.5 and noise multiplier 1.5 to 2, " in said
    said = site_statement(ledger, clipping_norm=0.5, num_sites=9)
    assert said.startswith("Each of 9 sites " + level.format("one site"))
    assert ": 12 rounds in 2 runs (two, one), updates clipped to 0.5 and noise" in said
    ledger.spend(Release(0.1, 0.0, 1))
    for said in (
        record_statement(ledger, clipping_norm=0.5, num_rows=1200),
        site_statement(ledger, clipping_norm=0.5, num_sites=9),
    ):
        assert said.startswith("No differential privacy")


def test_an_epsilon_that_is_no_number_is_beyond_every_budget(monkeypatch):
    monkeypatch.setattr("fedfora.privacy.ledger.epsilon_of", lambda *_, **__: math.nan)
    ledger = Ledger(DELTA, 2.0)
    with pytest.raises(BudgetSpent):
        ledger.spend(Release(0.1, 1.5, 1))
    assert not ledger.lines


def test_a_step_is_on_the_disk_before_it_is_taken(tmp_path, monkeypatch):
    """The file with its content, then its directory with its name: else the power takes it back."""
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    ledger = Ledger.open(tmp_path / "ledger.json", delta=DELTA, target_epsilon=2.0)
    ledger.spend(Release(0.1, 1.5, 1))
    assert [path == tmp_path for path in synced] == [False, True]
    assert synced[0].parent == tmp_path


def test_a_ledger_that_another_process_holds_is_not_spent_from(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr("fedfora.privacy.ledger.LOCK_S", 0.05)
    ledger = Ledger.open(tmp_path / "ledger.json", delta=DELTA, target_epsilon=2.0)
    with FileLock(tmp_path / ".ledger.json.lock"), pytest.raises(ValueError, match="held by"):
        ledger.spend(Release(0.1, 1.5, 1))
    assert not ledger.path.exists()


def test_the_ledger_of_other_data_is_not_spent_from(tmp_path):
    ledger = Ledger.open(tmp_path / "rows-a.json", delta=DELTA, target_epsilon=2.0)
    ledger.spend(Release(0.1, 1.5, 1))
    (tmp_path / "rows-a.json").rename(tmp_path / "rows-b.json")
    with pytest.raises(ValueError, match=r"nothing was spent: .* other data, rows-a"):
        Ledger.open(tmp_path / "rows-b.json", delta=DELTA, target_epsilon=2.0)


def test_a_ledger_behind_a_link_is_one_ledger_and_behind_a_broken_link_none_begins(tmp_path):
    """As where the disk it leads to is not there: the budget would begin anew."""
    kept, link = tmp_path / "disk" / "site.json", tmp_path / "kit" / "site.json"
    link.parent.mkdir()
    link.symlink_to(kept)
    with pytest.raises(ValueError, match="nothing was spent"):
        Ledger.open(link, delta=DELTA, target_epsilon=2.0)
    for path in (kept, link, kept):
        Ledger.open(path, delta=DELTA, target_epsilon=2.0).spend(Release(0.1, 1.5, 1))
    (release,) = Ledger.open(link, delta=DELTA, target_epsilon=2.0).releases
    assert release.count == 3


def test_a_mechanism_that_a_ledger_names_is_counted_as_that_one_or_not_at_all(tmp_path):
    """One of a later version was counted as normal noise, and one of an earlier was not read."""
    path = tmp_path / "site.json"
    Ledger.open(path, delta=DELTA, target_epsilon=None).spend(Release(0.1, 1.5, 3), run="early")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedfora.privacy.ledger.Release", WithMechanism)
        later = Ledger.open(path, delta=DELTA, target_epsilon=None)
        assert later.lines == [Line(WithMechanism(0.1, 1.5, 3), "early")]
        later.spend(WithMechanism(0.1, 1.5, 2, "laplace"))
    with pytest.raises(ValueError, match=r"nothing was spent: .*mechanism"):
        Ledger.open(path, delta=DELTA, target_epsilon=2.0)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"releases": [{"count": 1}]}'])
def test_a_ledger_that_was_cut_or_is_none_is_not_spent_from(tmp_path, content):
    (tmp_path / "site.json").write_text(content)
    with pytest.raises(ValueError, match="not a privacy ledger for these data; nothing was spent"):
        Ledger.open(tmp_path / "site.json", delta=DELTA, target_epsilon=2.0)


def test_a_budget_that_no_noise_keeps_is_refused_with_what_can_be_had():
    with pytest.raises(ValueError, match=r"_epsilon 0.0001 cannot be reached \(steps: 60\)"):
        noise_multiplier_for(target_epsilon=1e-4, delta=DELTA, sampling_rate=1.0, count=60)


@pytest.mark.parametrize(("spent", "times"), [(0, 1), (10, 2), (18, 10), (19, None)])
def test_steps_that_are_left_get_more_noise_up_to_four_times(spent, times):
    """Of whole samples 1 / z^2 adds up: where 1 / n of it is left, z grows by the root of n."""
    alone = noise_multiplier_for(target_epsilon=2.0, delta=DELTA, sampling_rate=1.0, count=20)
    ledger = Ledger(DELTA, 2.0)
    if spent:
        ledger.spend(Release(1.0, alone, spent))
    if times is None:  # the root of 20 is more than 4
        with pytest.raises(BudgetSpent):
            ledger.noise_for(1.0, planned=20, left=20)
        return
    noise = ledger.noise_for(1.0, planned=20, left=20)
    assert noise == pytest.approx(math.sqrt(times) * alone, rel=0.03)
    assert epsilon_of([*ledger.releases, Release(1.0, noise, 20)], DELTA) <= 2.0
