"""Noise in shares: every sum that can be opened has the central noise, whoever drops out."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq

from fedfora.federated.secure_aggregation.fixed_point import (
    FixedPoint,
    contribution_with_noise,
    read_sum,
)
from fedfora.federated.secure_aggregation.messages import Terms
from fedfora.federated.secure_aggregation.server import RoundLost
from fedfora.federated.settings import from_run_config
from fedfora.federated.shared_noise import (
    MIN_STEPS_PER_STD,
    ROWS_OF_UNIT,
    SharedNoise,
    shared_release,
)
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.federated.site import client_app, secure_answers
from fedfora.federated.site.training import private_sum
from fedfora.federated.site_runtime import load_runtime, open_site
from fedfora.federated.wire.transport import flatten
from fedfora.models.saving import read_adapter
from fedfora.privacy.accounting import Release, epsilon_of
from fedfora.privacy.clipping import SecretNoise
from fedfora.reporting.history import read_lines
from fedfora.reporting.view import View


def terms_of(count, fraction=0.66):
    return Terms(1, tuple(range(count)), fraction, bytes(32))


@pytest.mark.parametrize("count", [3, 5, 12])
def test_the_fewest_survivors_without_one_still_have_the_central_noise(count):
    terms, noise, code = terms_of(count), SharedNoise(2.0, 0.5), FixedPoint(16.0, count, 1)
    shares = [noise.draw(20_000, terms, code) for _ in range(terms.min_survivors - 1)]
    assert code.step * float(np.std(sum(shares))) == pytest.approx(2.0 * 0.5, rel=0.03)


def test_two_shares_are_never_the_same():
    noise, terms, code = SharedNoise(1.0, 1.0), terms_of(4), FixedPoint(16.0, 4, 1)
    assert not np.array_equal(noise.draw(100, terms, code), noise.draw(100, terms, code))


def test_a_share_has_a_step_more_than_the_noise_that_is_accounted(monkeypatch):
    """That pays for the difference to normal noise: see the module."""
    asked = []
    monkeypatch.setattr(SecretNoise, "discrete_normal", lambda self, n, std: asked.append(std))
    terms, noise, code = terms_of(5), SharedNoise(2.0, 0.5), FixedPoint(16.0, 5, 1)
    noise.draw(10, terms, code)
    assert asked[0] >= noise.std(terms) / code.step + 1
    assert asked[0] >= MIN_STEPS_PER_STD
    assert asked[0] ** 2 - (noise.std(terms) / code.step) ** 2 >= 8**2


def test_without_noise_nothing_is_drawn():
    drawn = SharedNoise(0.0, 1.0).draw(5, terms_of(4), FixedPoint(16.0, 4, 1))
    assert not drawn.any()
    assert drawn.dtype == np.int64


@settings(max_examples=30)
@given(st.integers(0, 100), st.floats(1e-3, 1e3), st.integers(3, 9))
def test_a_sites_update_moves_the_sum_by_at_most_the_clipping_norm(seed, scale, count):
    """Against a site that takes part with nothing, under the same noise, on the grid itself."""
    rng = np.random.default_rng(seed)
    code, norm = FixedPoint(4.0, count, 1), 1.0
    noise_N = rng.integers(-(2**31), 2**31, size=50)
    update_N = scale * rng.normal(size=50)
    made, nothing = (
        contribution_with_noise(u, noise_N, code=code, clipping_norm=norm)
        for u in (update_N, 0 * update_N)
    )
    moved = (made - nothing)[:50].view(np.int32).astype(np.float64) * code.step
    assert np.linalg.norm(moved) <= norm
    assert np.linalg.norm(moved) >= min(norm, np.linalg.norm(update_N)) - 1e-5
    assert np.array_equal(made[50:], nothing[50:])  # loss, weight and counts are the same for all


def test_the_sum_is_that_of_updates_and_noise_even_where_a_share_leaves_the_range():
    code, rng = FixedPoint(2.0, 4, 1), np.random.default_rng(0)
    updates = [rng.normal(size=1000) / 100 for _ in range(4)]
    noises = [rng.normal(size=1000) * 5 for _ in range(2)]
    noises += [-noises[0] + 0.01, -noises[1]]  # each beyond the range, their sum within
    noises = [np.rint(noise / code.step).astype(np.int64) for noise in noises]
    words = [
        contribution_with_noise(u, n, code=code, clipping_norm=1.0)
        for u, n in zip(updates, noises, strict=True)
    ]
    summed = read_sum(np.sum(words, axis=0, dtype=np.uint32), code)
    expected = (sum(updates) + sum(noises) * code.step) / 4
    assert np.abs(summed.mean_N - expected).max() <= 2 * code.step
    assert (summed.weight, summed.loss, summed.clipped) == (4, 0.0, 0)


def test_an_update_that_is_no_number_leaves_the_noise_alone():
    code, noise_N = FixedPoint(4.0, 3, 1), np.full(5, 25)
    broken = contribution_with_noise(np.full(5, np.nan), noise_N, code=code, clipping_norm=1.0)
    empty = contribution_with_noise(np.zeros(5), noise_N, code=code, clipping_norm=1.0)
    assert np.array_equal(broken, empty)


def test_a_range_too_narrow_or_too_coarse_is_refused():
    noise, terms = SharedNoise(4.0, 1.0), terms_of(5)
    with pytest.raises(ValueError, match="--secagg_range 1 does not hold"):
        noise.check(terms, FixedPoint(1.0, 5, 1))
    # Five updates and eight deviations of five shares' noise (four must last, one may be curious).
    needed = (5 * 1.0 + 8 * 4.0 / math.sqrt(3) * math.sqrt(5)) / 5
    noise.check(terms, FixedPoint(1.001 * needed, 5, 1))
    with pytest.raises(ValueError, match="does not hold updates"):
        noise.check(terms, FixedPoint(0.999 * needed, 5, 1))
    with pytest.raises(ValueError, match="too coarse"):
        SharedNoise(4.0, 1e-5).check(terms, FixedPoint(20.0, 5, 1))


@pytest.fixture
def settings_for(tiny_dir, tmp_path):
    """A function from flags to the settings of four clinics under both protections."""

    def made(name, **more):
        flags = {
            "model_name_or_path": tiny_dir,
            "quantization": "none",
            "train_file": "clinic",
            "partition": "by-column:specialty",
            "output_dir": str(tmp_path / name),
            "lora_rank": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_rounds": 2,
            "local_steps": 1,
            "secure_aggregation": True,
            "secagg_range": 16.0,
            "weighting": "equal",
            "privacy_unit": "site",
        }
        return from_run_config({**flags, **more})

    return made


@pytest.fixture
def run(settings_for, tmp_path):
    """A function that simulates them."""

    def simulated(name, **more):
        simulated.settings = settings_for(name, **more)
        simulate(simulated.settings, View(1))
        return tmp_path / name

    return simulated


def test_a_federation_hides_its_sites_and_every_site_keeps_account(run, ledgers, monkeypatch):
    told, facts_of = [], client_app.site_facts
    monkeypatch.setattr(
        client_app, "site_facts", lambda *of: told.append(facts_of(*of)) or told[-1]
    )
    out = run("out", noise_multiplier=3.0)
    rounds = read_rounds(out)
    spent = epsilon_of([Release(1.0, 3.0, 2)], 1e-5)
    assert rounds[-1]["epsilon"] == pytest.approx(spent)
    assert "3 shares" not in rounds[-1]["privacy_statement"]
    assert "so that 2 shares beside that one site's" in rounds[-1]["privacy_statement"]
    kept = [*ledgers.glob("sites-*.json"), *ledgers.glob("rows-*.json")]
    assert len(kept) == 5
    for path in kept:
        ledger = json.loads(path.read_text())
        assert [line["settings"]["round"] for line in ledger["releases"]] == [1, 2]
        for line in ledger["releases"]:
            release = (line["sampling_rate"], line["noise_multiplier"], line["count"])
            assert release == (1.0, 3.0, 1)
    for line in rounds:
        assert "loss" not in line
        assert not {"clipped_numbers", "shortened_updates"} & line["secure_aggregation"].keys()
        assert line["secure_aggregation"]["weight"] == 4
    assert [(facts["data-digest"], facts["rows"]) for facts in told] == [("", 0)] * len(told)
    assert len({facts["name"] for facts in told}) == 4


def test_the_adapter_has_the_noise_of_all_survivors(run):
    """Of four shares, each of z C / sqrt(2), over four sites; the updates are nothing beside it."""
    first, second = (
        read_adapter(run(name, noise_multiplier=4.0, num_rounds=1)) for name in ("one", "other")
    )
    name = next(key for key in first if key.endswith("gate_proj.D"))
    difference = (first[name] - second[name]).double()
    expected = 4.0 / math.sqrt(2) * math.sqrt(4) / 4 * math.sqrt(2)
    assert float(difference.std()) == pytest.approx(expected, rel=0.2)


def test_no_noise_is_the_plain_mean_of_clipped_updates(run):
    hidden = read_adapter(run("hidden", noise_multiplier=0.0, clipping_norm=0.01, num_rounds=1))
    plain = read_adapter(
        run(
            "plain",
            noise_multiplier=0.0,
            clipping_norm=0.01,
            num_rounds=1,
            secure_aggregation=False,
        )
    )
    for name, value in plain.items():
        assert (value - hidden[name]).abs().max() <= 1e-6


def test_a_site_whose_budget_is_spent_sends_nothing(run, monkeypatch):
    sent = []
    original = secure_answers.contribution_with_noise
    monkeypatch.setattr(
        secure_answers,
        "contribution_with_noise",
        lambda *args, **kwargs: sent.append(1) or original(*args, **kwargs),
    )
    run("spent", target_epsilon=2.0)
    assert len(sent) == 8
    with pytest.raises(ValueError, match="privacy budget does not allow"):
        run("again", target_epsilon=2.0)
    assert len(sent) == 8


# Of single records: a round is one step, and what a site sends its sample's summed gradients.


@pytest.fixture
def shared(rows_file):
    """Flags of three sites of eight rows that share the noise on records."""
    from fedfora.data.clinic import clinic_rows

    rows = rows_file(clinic_rows()[:24], "shared.json")
    return {
        **{"train_file": rows, "partition": "iid", "num_clients": 3, "privacy_unit": "record"},
        **{"shared_noise": True, "secagg_range": 1.0},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    }


@pytest.fixture
def clinics(run, shared):
    """A function that simulates them."""
    return lambda name, **more: run(name, **{**shared, **more})


OF_RECORDS = SharedNoise(2.0, 1 / ROWS_OF_UNIT, of_records=True)


@pytest.mark.parametrize("count", [3, 5, 12])
def test_a_sum_over_records_has_the_stated_noise_whoever_drops_out(count):
    """As many as may drop out have gone, and one more takes off its own share."""
    terms, noise, code = terms_of(count), OF_RECORDS, FixedPoint(1.0, count, 1)
    noise.check(terms, code)
    shares = [noise.draw(20_000, terms, code) for _ in range(terms.min_survivors - 1)]
    std = code.step * float(np.std(sum(shares)))
    assert std == pytest.approx(2.0 / ROWS_OF_UNIT, rel=0.03)


def test_a_share_pays_for_the_rounding_that_a_record_can_change(monkeypatch):
    asked = []
    monkeypatch.setattr(SecretNoise, "discrete_normal", lambda self, n, std: asked.append(std))
    terms, noise, code = terms_of(5), OF_RECORDS, FixedPoint(1.0, 5, 1)
    noise.draw(10_000, terms, code)
    moved = 1 / ROWS_OF_UNIT + code.step * math.sqrt(10_000)
    assert asked[0] * code.step >= 2.0 * moved / math.sqrt(terms.min_survivors - 1)


@settings(max_examples=30)
@given(st.integers(0, 100), st.floats(1e-3, 1e3), st.booleans())
def test_a_record_moves_the_sum_by_its_clipped_gradient_and_the_grid(seed, scale, at_the_edge):
    """Also where the sum leaves the range: each number is cut, which brings nothing apart.

    A sum that was scaled into the range would move in all its numbers when one crosses the edge.
    """
    rng = np.random.default_rng(seed)
    code, noise_N = FixedPoint(1.0, 3, 1), rng.integers(-(2**20), 2**20, size=50)
    sum_N, record_N = scale * rng.normal(size=50), rng.normal(size=50)
    if at_the_edge:
        sum_N, record_N = np.full(50, code.value_range / 2), np.eye(50)[0]
    record_N /= ROWS_OF_UNIT * np.linalg.norm(record_N)
    with_it, without = (
        contribution_with_noise(each, noise_N, code=code, clipping_norm=None)
        for each in (sum_N + record_N, sum_N)
    )
    moved = (with_it - without)[:50].view(np.int32).astype(np.float64) * code.step
    assert np.linalg.norm(moved) <= 1 / ROWS_OF_UNIT + code.step * math.sqrt(50)
    assert np.array_equal(with_it[50:], without[50:])


@pytest.fixture
def site(settings_for, shared):
    """A function from flags to a federation's settings, runtime and first site; nothing is run."""

    def opened(**more):
        settings_ = settings_for("out", **{**shared, **more})
        runtime = load_runtime(settings_.run_config())
        return settings_, runtime, open_site(runtime, 0)

    return opened


def test_a_record_moves_what_its_site_sums_by_what_the_noise_is_made_for(site):
    """Whatever C is: here no gradient is as short. Of the factors only those that travel count."""
    settings_, runtime, whole = site(
        noise_multiplier=3.0, clipping_norm=0.01, sampling_rate=1.0, lora_dropout=0.0
    )
    noise, rows = SharedNoise.of(settings_), whole.encoded
    generator = torch.Generator().manual_seed(0)
    adapter = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in runtime.fresh.items()
    }

    def summed(rows):
        step, _ = private_sum(runtime, replace(whole, encoded=rows), adapter)
        return torch.cat([tensor.double().flatten() for tensor in step.values()])

    everybody = summed(rows)
    for i in range(len(rows)):
        moved = float((everybody - summed(rows[:i] + rows[i + 1 :])).norm())
        assert moved == pytest.approx(noise.clipping_norm, rel=1e-3)
    assert (noise.noise_multiplier, noise.of_records) == (3.0, True)


def test_a_site_draws_its_sample_in_secret_at_the_rate_that_it_pays_for(site, monkeypatch):
    settings_, runtime, few = site(noise_multiplier=1.0, sampling_rate=0.4)
    drawn, sample = [], SecretNoise.sample

    def noted(self, num_rows, rate):
        drawn.append((num_rows, rate, sample(self, num_rows, rate)))
        return drawn[-1][-1]

    def no_gradient(model, *_, **__):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(SecretNoise, "sample", noted)
    monkeypatch.setattr("fedfora.federated.site.training.write_private_gradient", no_gradient)
    for _ in range(2):
        private_sum(runtime, replace(few, encoded=200 * few.encoded), runtime.fresh)
    assert [each[:2] for each in drawn] == [(1600, 0.4)] * 2
    assert drawn[0][2] != drawn[1][2]
    assert shared_release(settings_, 1).sampling_rate == 0.4


@pytest.mark.parametrize(
    ("secagg_range", "message"), [(0.03, "does not hold updates"), (10_000.0, "too coarse")]
)
def test_a_site_neither_pays_nor_sends_where_the_noise_does_not_fit(
    clinics, ledgers, tmp_path, secagg_range, message
):
    with pytest.raises(RoundLost, match="0 of 3 sites sent a vector"):
        clinics("out", noise_multiplier=3.0, secagg_range=secagg_range)
    refused = [e for e in read_lines(tmp_path / "out" / "metrics.jsonl") if "reason" in e]
    assert len(refused) == 3
    assert all(message in event["reason"] for event in refused)
    assert not list(ledgers.glob("rows-*.json"))


def test_a_sum_over_many_rows_is_cut_and_does_not_wrap_around():
    """A gradient that most rows share, in one number: beyond the range it would change its sign."""
    code, nothing = FixedPoint(1.0, 3, 1), np.zeros(4, dtype=np.int64)
    sum_N = np.array([0.25, 0.9, -1.1, 3.0])
    words = contribution_with_noise(sum_N, nothing, code=code, clipping_norm=None)
    summed = read_sum(np.sum([words] * 3, axis=0, dtype=np.uint32), code)
    np.testing.assert_allclose(summed.mean_N, [0.25, 0.5, -0.5, 0.5], atol=code.step)


def test_without_noise_a_round_is_a_step_of_adam_on_all_sites_rows(clinics, run, monkeypatch):
    """What a site sends is its rows' gradient on the grid: nothing of it is cut or shortened.

    Adam's first step moves every number by the rate against the sign of the summed gradient.
    """
    from fedfora.models.losses import row_losses

    options = {
        **{"noise_multiplier": 0.0, "clipping_norm": 1.0, "sampling_rate": 1.0, "num_rounds": 1},
        **{"learning_rate": 0.01, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"},
    }
    sent, original = [], secure_answers.contribution_with_noise

    def noted(update_N, noise_N, *, code, **how):
        words = original(update_N, noise_N, code=code, **how)
        sent.append((update_N, words[: len(update_N)].view(np.int32) * code.step, code.step))
        return words

    monkeypatch.setattr(secure_answers, "contribution_with_noise", noted)
    out = clinics("out", **options)
    runtime = load_runtime(run.settings.run_config())
    collate = DataCollatorForSeq2Seq(runtime.base.tokenizer, label_pad_token_id=-100)
    runtime.load(runtime.fresh)
    runtime.model.zero_grad()
    for index in range(3):
        batch = collate(open_site(runtime, index).encoded)
        row_losses(runtime.model, dict(batch)).sum().backward()
    gradients = {
        name.removeprefix("base_model.model."): parameter.grad
        for name, parameter in runtime.model.named_parameters()
        if parameter.grad is not None
    }
    expected = {}
    for key, value in runtime.fresh.items():
        layer, _, factor = key.rpartition(".")
        gradient = gradients.get(f"{layer}.fora_{factor}.default.weight", torch.zeros_like(value))
        expected[key] = -gradient / ROWS_OF_UNIT
    summed = np.sum([update_N for update_N, _, _ in sent], axis=0)
    assert np.linalg.norm(summed) > 2 / ROWS_OF_UNIT  # of several rows, each of which fits
    np.testing.assert_allclose(summed, flatten(expected, runtime.layout), rtol=1e-3, atol=1e-7)
    for update_N, words, step in sent:
        np.testing.assert_allclose(words, update_N, rtol=0, atol=step)
    after, checked = read_adapter(out), 0
    for name, parameter in runtime.model.named_parameters():
        if ".fora_D." not in name or parameter.grad is None:
            continue
        key = name.removeprefix("base_model.model.").replace(".fora_D.default.weight", ".D")
        clear = (
            parameter.grad.abs() > 0.1 * parameter.grad.abs().max()
        )  # of the fixed point's steps
        expected = -0.01 * parameter.grad.sign()
        torch.testing.assert_close(after[key][clear], expected[clear], rtol=0.02, atol=0)
        checked += int(clear.sum())
    assert checked > 100


def test_sites_that_share_noise_on_records_keep_account_and_send_nothing_beyond(clinics, ledgers):
    out = clinics("out", target_epsilon=4.0)
    last = read_rounds(out)[-1]
    assert "so that 2 shares beside that one site's make the noise" in last["privacy_statement"]
    kept = [json.loads(path.read_text()) for path in ledgers.glob("rows-*.json")]
    assert len(kept) == 3
    for ledger in kept:
        assert [line["settings"]["round"] for line in ledger["releases"]] == [1, 2]
        assert {line["sampling_rate"] for line in ledger["releases"]} == {0.5}
        assert 3.9 < ledger["epsilon"] <= 4
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="privacy budget does not allow"):
        clinics("out", target_epsilon=4.0, overwrite_output_dir=True)
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("unit", "rate"), [("record", 0.5), ("site", 1.0)])
def test_shares_that_would_end_in_the_middle_leave_the_earlier_run_alone(clinics, run, unit, rate):
    """Half of what a second run needs is there: it is refused before it takes the first's place."""
    federate = {"record": clinics, "site": run}[unit]
    out = federate("one", noise_multiplier=3.0)
    before = (out / "metrics.jsonl").read_bytes()
    budget = epsilon_of([Release(rate, 3.0, 3)], 1e-5) + 1e-3
    again = {"target_epsilon": budget, "overwrite_output_dir": True}
    with pytest.raises(ValueError, match="privacy budget does not allow"):
        federate("one", noise_multiplier=3.0, **again)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_site_sends_nothing_beyond_its_budget_to_a_coordinator_that_asks_all_the_same(
    clinics, monkeypatch
):
    """Each site looks into its own ledger: here the coordinator does not look before it asks."""
    sent, original = [], secure_answers.contribution_with_noise
    monkeypatch.setattr(
        secure_answers,
        "contribution_with_noise",
        lambda *args, **kwargs: sent.append(1) or original(*args, **kwargs),
    )
    monkeypatch.setattr("fedfora.federated.simulation._check_budget", lambda *_: None)
    clinics("out", target_epsilon=4.0)
    assert len(sent) == 6
    with pytest.raises(RoundLost, match="0 of 3 sites sent a vector"):
        clinics("again", target_epsilon=4.0)
    assert len(sent) == 6


@pytest.mark.parametrize("ends", ["with an error", "with numbers that are none"])
@pytest.mark.parametrize(("unit", "work"), [("record", "private_sum"), ("site", "train_round")])
def test_a_site_pays_before_it_looks_at_rows_and_answers_whatever_they_do(
    clinics, run, ledgers, monkeypatch, unit, work, ends
):
    """An error before it paid told of the rows, and the round could be asked for again for nothing.

    Now the noise is sent alone, also where a coordinator's adapter leads to numbers that are not
    finite with some rows and not with others.
    """
    paid, original = [], getattr(client_app, work)

    def fails(runtime, site, *args, **options):
        kept = json.loads((ledgers / f"{site.ledger}.json").read_text())["releases"]
        paid.append(sum(line["count"] for line in kept))
        if ends == "with an error":
            raise RuntimeError("only with this row")
        trained, result = original(runtime, site, *args, **options)
        return {name: torch.full_like(value, math.nan) for name, value in trained.items()}, result

    monkeypatch.setattr(client_app, work, fails)
    out = {"record": clinics, "site": run}[unit]("out", noise_multiplier=3.0)
    sites = {"record": 3, "site": 4}[unit]
    assert paid == [1] * sites + [2] * sites
    rounds, kept = read_rounds(out), ledgers.glob("rows-*.json")
    assert [line["secure_aggregation"]["weight"] for line in rounds] == [sites] * 2
    for path in kept:  # and the coordinator states what each site has spent
        assert json.loads(path.read_text())["epsilon"] == pytest.approx(rounds[-1]["epsilon"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"secure_aggregation": False}, "--secure_aggregation is missing"),
        ({"local_steps": 2}, "--local_steps 2: with --shared_noise a round is one step"),
        ({"per_device_train_batch_size": 2}, "--sampling_rate, no batch"),
        ({"aggregation": "core"}, "--aggregation core: with --shared_noise use fedavg"),
        ({"weighting": "tokens", "max_weight": 9.0}, "--weighting tokens: with --shared_noise"),
        ({"server_optimizer": "momentum"}, "no other optimizer"),
        ({"optim": "sgd"}, "no other optimizer"),
        ({"weight_decay": 0.1}, "no other optimizer"),
        ({"proximal_mu": 0.1}, "--proximal_mu 0.1: with --shared_noise sites take no steps"),
        ({"max_update_norm": 1.0}, "--max_update_norm: with --shared_noise each record is clipped"),
        ({"privacy_unit": "site"}, "--shared_noise needs --privacy_unit record"),
        ({"num_clients": 2}, "at least 3 are needed"),
    ],
)
def test_what_does_not_go_with_shared_noise_is_refused(clinics, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        clinics("out", noise_multiplier=1.0, **flags)
    assert not (tmp_path / "out").exists()
