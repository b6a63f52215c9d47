"""Site-level privacy: what a site can move, what the noise is, and when the rounds end."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfora.federated.coordinator.site_privacy import (
    SitePrivacy,
    record_event,
    site_privacy_of,
    sites_ledger,
)
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.models.saving import read_adapter
from fedfora.privacy.accounting import Release, epsilon_of
from fedfora.privacy.clipping import SecretNoise
from fedfora.privacy.ledger import Ledger
from fedfora.privacy.settings import PrivacyArguments, noise_of
from fedfora.reporting.view import View

INFINITE = float("inf")


def adapters(seed, count, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.A": (2, 5), "q.D": (6, 2), "q.E": (2, 2)}
    return [
        {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def released(privacy, current, updates):
    """What the mechanism releases with the plain mean as its rule."""
    clipped = [update for update, _ in privacy.clipped(current, [(u, 7.0) for u in updates])]
    mean = {name: torch.stack([u[name] for u in clipped]).mean(0) for name in current}
    return privacy.noisy(current, mean)


def mechanism(noise_multiplier, clipping_norm, num_sites, **more):
    return SitePrivacy(noise_multiplier, clipping_norm, num_sites, Ledger(1e-5), **more)


def test_no_noise_and_no_clip_are_the_mean():
    current, *updates = adapters(1, 5)
    found = released(mechanism(0.0, INFINITE, 4), current, updates)
    for name in current:
        expected = torch.stack([update[name] for update in updates]).mean(0)
        torch.testing.assert_close(found[name], expected)


@given(st.integers(0, 500), st.integers(2, 6), st.floats(0.01, 100), st.floats(0.01, 10))
def test_one_site_moves_the_adapter_by_its_share_of_the_clipping_norm(seed, n, scale, norm):
    current, *updates = adapters(seed, n + 1, scale)
    privacy = mechanism(0.0, norm, n)
    whole, without = (released(privacy, current, u) for u in (updates, updates[:-1]))
    moved = torch.cat([(whole[name] - without[name]).double().flatten() for name in whole]).norm()
    assert float(moved) <= norm / n * (1 + 1e-3) + 1e-5 * scale


def test_noise_is_that_of_the_sum_over_the_number_asked():
    zeros = {"q.A": torch.zeros(200, 100)}
    privacy = mechanism(3.0, 0.5, 4, noise=SecretNoise(bytes(32)))
    found = released(privacy, zeros, [zeros, zeros])
    assert float(found["q.A"].std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.03)


def test_the_budget_lasts_for_the_planned_rounds_and_no_more():
    arguments = PrivacyArguments(privacy_unit="site", target_epsilon=4.0)
    ledger = Ledger(arguments.target_delta, arguments.target_epsilon)
    privacy = site_privacy_of(arguments, ledger, num_sites=8, num_rounds=5)
    for number in range(1, 6):
        privacy.begin(number)
    assert 3.9 < ledger.epsilon <= 4
    with pytest.raises(ValueError, match="privacy budget does not allow"):
        privacy.begin(6)
    assert "8 sites" in privacy.event()["privacy_statement"]


def test_a_round_that_is_repeated_is_paid_again_and_the_others_get_more_noise():
    arguments = PrivacyArguments(privacy_unit="site", target_epsilon=4.0)
    ledger = Ledger(arguments.target_delta, arguments.target_epsilon)
    privacy = site_privacy_of(arguments, ledger, num_sites=8, num_rounds=3)
    for number in (1, 1, 2, 3):
        privacy.begin(number)
    assert sum(release.count for release in ledger.releases) == 4
    assert ledger.releases[0].noise_multiplier < ledger.releases[-1].noise_multiplier
    assert ledger.epsilon <= 4


def test_a_coordinator_counts_shared_noise_as_the_sites_add_it_however_often_a_round_is_repeated():
    """Its own noise grows where less is left of the budget; that of the sites is the plan's."""
    arguments = PrivacyArguments(privacy_unit="site", target_epsilon=4.0)
    ledger, planned = Ledger(arguments.target_delta, 4.0), {"num_sites": 8, "num_rounds": 3}
    privacy = site_privacy_of(arguments, ledger, min_noise_shares=6, **planned)
    for number in (1, 1, 2):
        privacy.begin(number)
    noise = noise_of(arguments, count=3)
    assert {release.noise_multiplier for release in ledger.releases} == {noise}
    with pytest.raises(ValueError, match="privacy budget does not allow"):
        privacy.begin(3)


def test_the_coordinator_states_the_weakest_sites_guarantee():
    arguments = PrivacyArguments(privacy_unit="record", noise_multiplier=1.0)
    event = record_event(arguments, [100, 400], rate_of=lambda rows: 10 / rows, total_steps=20)
    assert event["epsilon"] == epsilon_of([Release(0.1, 1.0, 20)], 1e-5)
    assert f"({event['epsilon']:.2f}, 1e-05)" in event["privacy_statement"]
    for target, stated in ((0.5, 0.5), (50.0, event["epsilon"])):  # whichever ends the steps
        both = PrivacyArguments(privacy_unit="record", noise_multiplier=1.0, target_epsilon=target)
        told = record_event(both, [100, 400], rate_of=lambda rows: 10 / rows, total_steps=20)
        assert told["epsilon"] == stated
    for told in ([0, 0], [100, 0]):
        untold = record_event(arguments, told, rate_of=lambda rows: 0.1, total_steps=20)
        assert untold["epsilon"] is None
        assert "only the sites know" in untold["privacy_statement"]


def settings_of(tiny_dir, out, **flags):
    return from_run_config(
        {
            "model_name_or_path": tiny_dir,
            "quantization": "none",
            "train_file": "clinic",
            "output_dir": str(out),
            "lora_rank": 2,
            "num_clients": 3,
            "num_rounds": 2,
            "local_steps": 1,
            **flags,
        }
    )


def test_a_federation_with_site_privacy_says_what_it_spent(tiny_dir, tmp_path, ledgers, caplog):
    private = {"privacy_unit": "site", "target_epsilon": 5.0}
    simulate(settings_of(tiny_dir, tmp_path, **private), View(1))
    assert "mean of the updates" not in caplog.text  # how far it is off has no noise
    rounds = read_rounds(tmp_path)
    assert 0 < rounds[0]["epsilon"] < rounds[1]["epsilon"] <= 5
    (path,) = ledgers.glob("sites-*.json")
    spent = json.loads(path.read_text())
    assert [line["settings"]["round"] for line in spent["releases"]] == [1, 2]
    for line in rounds:  # nothing of a single site but that it was there
        assert "loss" not in line
        told = {"site", "steps", "uplink_bytes", "downlink_bytes"}
        assert all(site.keys() == told for site in line["sites"])
    assert rounds[1]["privacy_statement"] in (tmp_path / "README.md").read_text()
    assert all(bool(value.isfinite().all()) for value in read_adapter(tmp_path).values())


def test_the_same_sites_have_one_ledger_however_their_file_is_spelled(
    tiny_dir, tmp_path, rows_file, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows_file([], "rows.json")

    def ledger(file, *names):
        return sites_ledger(settings_of(tiny_dir, "out", train_file=file), names)

    spelled = [
        ledger(file, "a", "b") for file in ("rows.json", "./rows.json", f"{tmp_path}/rows.json")
    ]
    assert len({*spelled, ledger("rows.json", "b", "a")}) == 1
    assert len({spelled[0], ledger("clinic", "a", "b"), ledger("rows.json", "a", "c")}) == 3


def test_the_record_of_hidden_sites_is_the_same_whatever_their_rows(tiny_dir, tmp_path, rows_file):
    """The guarantee holds against who sees it: digests of rows, and their numbers, would tell."""
    from fedfora.data.clinic import clinic_rows
    from fedfora.reporting.history import read_lines

    def record(name, rows):
        out, private = tmp_path / name, {"privacy_unit": "site", "noise_multiplier": 4.0}
        private |= {"train_file": rows_file(rows), "privacy_dir": str(tmp_path / f"{name}-ledgers")}
        simulate(settings_of(tiny_dir, out, **private), View(1))
        simulate(settings_of(tiny_dir, out, **private, resume=str(out)), View(1))
        files = [json.loads((out / file).read_text()) for file in ("sites.json", "fedfora.json")]
        lines = read_lines(out / "metrics.jsonl")
        times = {"time", "seconds", "wall_seconds"}
        return files, [{k: v for k, v in line.items() if k not in times} for line in lines]

    assert record("one", clinic_rows()[:9]) == record("other", clinic_rows()[9:21])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"aggregation": "refactor"}, "not a mean of clipped changes"),
        ({"secure_aggregation": True}, "--weighting tokens reveals"),
        ({"max_update_norm": 1.0}, "--clipping_norm shortens"),
        ({"validation_fraction": 0.1}, "a loss without noise"),
        ({"robust": "median"}, "only the mean"),
    ],
)
def test_what_would_break_the_bound_is_refused(tiny_dir, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        settings_of(tiny_dir, tmp_path, privacy_unit="site", noise_multiplier=1.0, **flags)
