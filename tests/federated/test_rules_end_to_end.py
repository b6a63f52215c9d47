"""Every aggregation rule in a simulated federation: what travels, stays, trains, and is saved."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedfora.adapter.state import fold
from fedfora.federated.aggregation import RULES
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import simulate
from fedfora.models.saving import read_adapter
from fedfora.reporting.view import View


@pytest.fixture
def run(tiny_dir, tmp_path):
    """A function that simulates with some flags, and returns the rounds and the run directory."""

    def simulated(name="out", **flags):
        out = tmp_path / name
        settings = from_run_config(
            {
                "model_name_or_path": tiny_dir,
                "quantization": "none",
                "train_file": "clinic",
                "partition": "by-column:specialty",
                "output_dir": str(out),
                "lora_rank": 2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2,
                "warmup_ratio": 0.0,
                "num_rounds": 2,
                "local_steps": 1,
                **flags,
            }
        )
        return simulate(settings, View(1)), out

    return simulated


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_runs_and_sends_only_what_it_needs(run, tiny_dir, name):
    rounds, out = run(aggregation=name, validation_fraction=0.1)
    adapter = read_adapter(out)
    five = {f: sum(v.numel() for n, v in adapter.items() if n.endswith(f)) for f in "ABCDE"}
    for number, line in enumerate(rounds):
        rule = RULES[name]
        for site in line["sites"]:
            sent = sum(4 * five[f] for f in rule.travels)
            assert sent <= site["uplink_bytes"] <= sent + 300
            received = sum(4 * five[f] for f in rule.travels)
            received += sum(4 * five[f] for f in rule.frozen) if number == 0 else 0
            assert received <= site["downlink_bytes"] <= received + 600
    assert {line["rule"] for line in rounds} == {name}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), out)


@pytest.mark.parametrize("name", ["core", "ffa"])
def test_frozen_factors_stay_as_they_are_and_the_others_learn(run, name):
    _, fresh = run("fresh", aggregation=name, learning_rate=0.0)
    _, trained = run("trained", aggregation=name)
    before, after = fold(read_adapter(fresh)), fold(read_adapter(trained))
    moved = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert moved == set(RULES[name].travels)


@pytest.mark.parametrize("name", ["core", "refactor", "ffa"])
def test_learning_rate_zero_leaves_the_base_model_as_it_is(run, name):
    _, out = run(aggregation=name, learning_rate=0.0)
    for layer, product in products(read_adapter(out)).items():
        assert product.abs().max() < 1e-6, layer


def test_sites_of_different_ranks_send_different_amounts(run):
    rounds, _ = run(aggregation="refactor", site_ranks="1 2")
    sizes = [site["uplink_bytes"] for site in rounds[0]["sites"]]
    assert sizes[0] == sizes[2] < sizes[1] == sizes[3]


def test_weights_are_tokens_rows_or_equal(run):
    """All four specialties have 600 rows, and notes of different lengths."""
    adapters = {
        how: read_adapter(run(how, weighting=how, num_rounds=1)[1])
        for how in ("tokens", "rows", "equal")
    }
    name = "model.layers.0.mlp.up_proj.D"
    assert torch.equal(adapters["rows"][name], adapters["equal"][name])
    assert not torch.equal(adapters["tokens"][name], adapters["equal"][name])


@pytest.mark.parametrize("update_dtype", ["int8", "int4"])
def test_what_a_format_lost_is_kept_at_the_site_and_sent_later(run, update_dtype):
    """Over many rounds the adapter stays as close to the one of float32 as a round's rest."""
    flags = {"num_rounds": 4, "lr_scheduler_type": "constant"}
    exact = fold(read_adapter(run("exact", **flags)[1]))
    _, out = run("coarse", update_dtype=update_dtype, **flags)
    coarse = fold(read_adapter(out))
    assert len(list((out / "sites").glob("*/after-*.safetensors"))) >= 4
    fresh = fold(read_adapter(run("fresh", num_rounds=1, learning_rate=0.0)[1]))
    moved = sum(float((exact[n] - fresh[n]).square().sum()) for n in exact) ** 0.5
    missed = sum(float((exact[n] - coarse[n]).square().sum()) for n in exact) ** 0.5
    assert 0 < missed < (0.05 if update_dtype == "int8" else 0.5) * moved


@pytest.mark.parametrize(("name", "kept"), [("refactor", False), ("core", True)])
def test_nothing_lost_is_added_to_factors_that_mean_something_else(run, name, kept):
    _, out = run(update_dtype="int8", num_rounds=1, aggregation=name)
    names = [name for path in (out / "sites").glob("*/after-*") for name in load_file(path)]
    assert any(name.startswith("lost//") for name in names) == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"site_ranks": "1 2"}, "--aggregation fedavg cannot mix --site_ranks"),
        ({"site_ranks": "4", "aggregation": "refactor"}, "--site_ranks 4 is above --lora_rank 2"),
        ({"aggregation": "refactor", "server_optimizer": "adam"}, "takes only --server_optimizer"),
        ({"aggregation": "refactor", "server_learning_rate": 0.5}, "at rate 1"),
        ({"beta_1": 1.0}, r"--beta_1 must be in \[0, 1\)"),
        ({"tau": 0.0}, "--tau must be above 0"),
        ({"aggregation": "fedavgg"}, "did you mean 'fedavg'"),
    ],
)
def test_what_a_rule_cannot_honor_is_refused(run, flags, message):
    with pytest.raises(ValueError, match=message):
        run(**flags)


def test_a_run_whose_sites_remember_something_can_be_run_over(run):
    """Frozen factors lie in each site's place of the run; they are fedfora's own."""
    _, out = run(aggregation="core", num_rounds=1)
    assert list(out.glob("sites/*/after-*"))
    rounds, _ = run(aggregation="core", num_rounds=1, overwrite_output_dir=True)
    assert len(rounds) == 1


def products(adapter):
    """D (I + E + C B) A of every layer, in float64."""
    result = {}
    for layer in {name.rpartition(".")[0] for name in adapter}:
        A, B, C, D, E = (adapter[f"{layer}.{f}"].double() for f in "ABCDE")
        result[layer] = D @ (torch.eye(len(A)).double() + E + C @ B) @ A
    return result
