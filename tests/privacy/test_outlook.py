"""What a budget leaves to learn, from arithmetic alone."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfora.cli.main import main
from fedfora.federated import simulation
from fedfora.federated.secure_aggregation.messages import Terms
from fedfora.federated.settings import from_run_config
from fedfora.federated.shared_noise import SharedNoise
from fedfora.federated.site.training import plan_round
from fedfora.models.adapter_base import add_adapter
from fedfora.models.loading import load_base
from fedfora.models.settings import AdapterArguments
from fedfora.privacy.accounting import Release, noise_multiplier_for
from fedfora.privacy.outlook import expectation, noise_to_signal, outlook_line
from fedfora.privacy.settings import PrivacyArguments, check_num_rows
from fedfora.training.privacy_plan import rate_for_noise
from fedfora.training.settings import TrainArguments, private_steps


def test_the_noise_is_that_of_a_steps_mean_gradient():
    """z sqrt(d) / (q N); four sites of their own halve it, four that share one noise quarter it."""
    run, alone = Release(0.5, 2.0, 60), {"rows": 200, "trained": 10_000}
    assert noise_to_signal(run, **alone) == pytest.approx(2.0 * 100 / 100)
    assert noise_to_signal(run, **alone, sites=4) == pytest.approx(1.0)
    assert noise_to_signal(run, **alone, sites=4, shares=4) == pytest.approx(0.5)
    assert noise_to_signal(run, **alone, sites=4, shares=1) == pytest.approx(1.0)


def test_of_the_same_budget_more_steps_on_all_rows_are_no_noisier():
    """With full batches z grows as the square root of the steps, and nu takes that back."""

    def nu(steps):
        z = noise_multiplier_for(target_epsilon=8, delta=1e-5, sampling_rate=1.0, count=steps)
        return noise_to_signal(Release(1.0, z, steps), rows=600, trained=10_000)

    assert nu(120) == pytest.approx(nu(30), rel=0.01)


def test_the_noise_of_a_whole_training_leads_as_far_however_many_steps_it_has():
    fresh, public = AdapterArguments(), AdapterArguments(start_adapter="public")
    rates = [rate_for_noise(128, steps, fresh) * steps**0.5 for steps in (1, 60, 120)]
    assert rates == pytest.approx(rates[:1] * 3)
    assert rate_for_noise(128, 60, public) == rate_for_noise(128, 60, fresh) / 2
    assert rate_for_noise(256, 60, fresh) == rate_for_noise(128, 60, fresh) / 2


def test_a_hopeless_training_is_warned_of_and_a_public_start_stands_more():
    assert "WARNING" in outlook_line(2.5, public_start=False)
    assert "--start_adapter" in outlook_line(2.5, public_start=False)
    assert "WARNING" not in outlook_line(2.5, public_start=True)
    for nu in (0.1, 1.0, 5.0, 50.0):
        order = [expectation(each, public_start=True) for each in (nu, 2 * nu)]
        assert order[0] == order[1] or not order[1].startswith("nearly all")


def test_a_budget_alone_is_a_recipe():
    hidden = PrivacyArguments(privacy_unit="record", target_epsilon=8)
    assert TrainArguments().sampling_rate(hidden, 600) == 0.5
    assert TrainArguments().sampling_rate(hidden, 3000) == 0.1  # 300 rows are enough
    shared = replace(hidden, shared_noise=True)  # one rate for all sites, whatever their rows
    assert TrainArguments().sampling_rate(shared, 3000) == 0.5
    assert private_steps(TrainArguments(), hidden, 600) == 120
    assert private_steps(TrainArguments(num_train_epochs=5), hidden, 600) == 10
    named = TrainArguments(per_device_train_batch_size=60, gradient_accumulation_steps=1)
    assert named.sampling_rate(hidden, 600) == 0.1
    assert private_steps(TrainArguments(max_steps=7), hidden, 600) == 7


@given(st.integers(2, 10**7))
def test_a_samples_lower_end_is_a_row_and_the_one_that_is_told_is_taken(rows):
    private = partial(PrivacyArguments, privacy_unit="record", target_epsilon=8, target_delta=1e-9)
    check_num_rows(private(sampling_rate=1 / rows), rows)
    with pytest.raises(ValueError, match=r"--sampling_rate .* is less than one of") as refused:
        check_num_rows(private(sampling_rate=0.99 / rows), rows)
    check_num_rows(private(sampling_rate=float(str(refused.value).split()[-1])), rows)


def test_check_privacy_says_what_to_expect(capsys):
    words = "check privacy --rows 600 --sites 4 --target_epsilon 8 --trained 102144"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "600 rows, 4 sites, 102,144 trained parameters" in out
    assert "passes over the rows: 60\n" in out
    assert "epsilon 8 at delta 1e-05; for a record replaced by another 18.1" in out
    assert out.count("nu 1.3\n") == out.count("nu 0.9\n") == 1


@pytest.mark.parametrize("shared", [False, True])
def test_the_outlook_counts_what_a_federation_trains_of_a_models_adapter(shared, tiny_dir, capsys):
    """Where sites share the noise, B and C are not trained."""
    model = {"model_name_or_path": tiny_dir, "quantization": "none", "lora_rank": 3}
    words = [word for name, value in model.items() for word in (f"--{name}", str(value))]
    command = [
        "check",
        "privacy",
        "--rows",
        "600",
        "--sites",
        "3",
        "--max_steps",
        "20",
        "--sampling_rate",
        "0.2",
    ]
    assert main([*command, "--target_epsilon", "8", *words]) == 0
    out = capsys.readouterr().out
    private = {"privacy_unit": "record", "target_epsilon": 8.0, "sampling_rate": 0.2}
    private |= {"shared_noise": True, "secure_aggregation": True} if shared else {}
    federation = {"num_clients": 3, "num_rounds": 20, "local_steps": 1, "weighting": "equal"}
    settings = from_run_config({**federation, **private, **model})
    fresh = add_adapter(load_base(settings.model), settings.adapter, seed=0)
    plan = None if shared else plan_round(settings, "rows", num_rows=600, first_step=0)
    rows = {f"site {number}": 600 for number in range(3)}
    told = simulation._outlook(settings, rows, SimpleNamespace(model=fresh), plan)
    kind = "sites share the noise (--shared_noise)" if shared else "each site adds all of the noise"
    assert f"{kind}: nu {re.search(r'noise is (.+) times', told)[1]}\n" in out


@pytest.mark.parametrize(
    ("sites", "threshold"), [(3, 0.66), (4, 0.66), (4, 1.0), (10, 0.75), (10, 1.0)]
)
def test_the_outlook_is_what_a_federation_with_shared_noise_is_told(sites, threshold, capsys):
    options = {"target_epsilon": 8.0, "sampling_rate": 0.2, "secagg_threshold": threshold}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = f"check privacy --rows 600 --sites {sites} --trained 5000 --max_steps 20".split()
    assert main([*command, *words]) == 0
    out = capsys.readouterr().out
    federation = {"num_clients": sites, "num_rounds": 20, "local_steps": 1, "weighting": "equal"}
    private = {"privacy_unit": "record", "shared_noise": True, "secure_aggregation": True}
    settings = from_run_config({**federation, **private, **options})
    model = SimpleNamespace(named_parameters=lambda: [("layer.fora_A.w", torch.zeros(5000))])
    rows = {f"site {number}": 600 for number in range(sites)}
    told = simulation._outlook(settings, rows, SimpleNamespace(model=model), None)
    noise, terms = SharedNoise.of(settings), Terms(1, tuple(range(sites)), threshold, b"")
    assert f"noise multiplier {noise.noise_multiplier:.3g}:" in out
    assert f"(--shared_noise): nu {re.search(r'noise is (.+) times', told)[1]}\n" in out
    run = Release(0.2, noise.noise_multiplier, 20)
    shares = (noise.noise_multiplier * noise.clipping_norm / noise.std(terms)) ** 2  # that make z C
    nu = noise_to_signal(run, rows=600, trained=5000, sites=sites, shares=round(shares))
    assert f"(--shared_noise): nu {nu:.2g}\n" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target_epsilon 8 --trained 9", "--rows is missing: fedfora check privacy --rows N"),
        ("--rows 600 --trained 9", "needs --target_epsilon or --noise_multiplier"),
        ("--rows 600 --target_epsilon 8", "--trained N, or --model_name_or_path"),
        ("--rows 600 --target_epsilon 1e-4 --trained 9", "--target_epsilon 0.0001 cannot be"),
        ("--rows 0 --target_epsilon 8 --trained 9", "--rows must be at least 1, got 0"),
        ("--rows 9 --target_epsilon 8 --sampling_rate 2", "--sampling_rate must be in (0, 1]"),
        ("--rows 9 --target_epsilon 8 --target_delta 0.5", "--target_delta 0.5 is not below"),
        ("--rows 9 --target_epsilon 8 --secagg_threshold 0.4", "--secagg_threshold must be in"),
        ("--rows 9 --target_epsilon 8 --secagg_range 2", "--secagg_range has no effect in fedfora"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, flags, message):
    assert main(["check", "privacy", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
