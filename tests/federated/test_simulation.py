"""A simulated federation: sampling, records, one base for all, faults of a site."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedfora.federated import site_runtime
from fedfora.federated.preflight import site_rows
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.federated.site_runtime import load_runtime, open_site
from fedfora.reporting.history import Follower
from fedfora.reporting.record import PASSING
from fedfora.reporting.view import View


def test_a_run_directory_tells_everything(settings, tmp_path, tiny_dir):
    rounds = simulate(
        settings(test_file="clinic:test", max_eval_samples=4, max_new_tokens=3), View(1)
    )
    out = tmp_path / "out"
    assert [r["round"] for r in rounds] == [1, 2]
    assert [s["site"] for s in rounds[0]["sites"]] == [
        *("cardiology", "dermatology", "neurology", "gastroenterology"),
    ]
    assert rounds[0]["scores"]["rows"] == 4
    assert {"loss", "answer_tokens", "uplink_bytes"} <= rounds[0]["sites"][0].keys()
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["federation"]["partition"] == "by-column:specialty"
    environment = json.loads((out / "environment.json").read_text())
    assert environment["seed"] == 42
    assert len(environment["base_fingerprint"]) == 32
    for adapter in (out, out / "round-001", out / "round-002"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), adapter)


def test_the_saved_adapter_is_what_peft_would_have_written(settings, tmp_path, tiny_dir):
    from safetensors.torch import load_file

    simulate(settings(), View(1))
    out = tmp_path / "out"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), out)
    model.save_pretrained(tmp_path / "again")
    one = load_file(out / "adapter_model.safetensors")
    two = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    ours, peft = (
        json.loads((d / "adapter_config.json").read_text()) for d in (out, tmp_path / "again")
    )
    for config in (ours, peft):
        config["target_modules"] = sorted(config["target_modules"])
    assert ours == peft | {"base_model_name_or_path": ours["base_model_name_or_path"]}


def test_uplink_bytes_are_the_folded_adapter(settings):
    (first, *_) = simulate(settings(num_rounds=1), View(1))
    h, m, r = 64, 128, 2
    per_layer = 4 * (h + h) + 2 * (h + m) + (m + h)
    numbers = 2 * (per_layer * r + 7 * r * r)
    assert 4 * numbers <= first["sites"][0]["uplink_bytes"] <= 4 * numbers + 200


def test_sampling_is_seeded_varies_and_reaches_everybody(settings):
    flags = {"partition": "iid", "num_clients": 6, "clients_per_round": 2, "num_rounds": 8}
    rounds = simulate(settings(**flags), View(1))
    drawn = [tuple(s["site"] for s in r["sites"]) for r in rounds]
    assert all(len(sites) == 2 and sites == tuple(sorted(sites)) for sites in drawn)
    assert len(set(drawn)) > 2
    again = simulate(settings(**flags, overwrite_output_dir=True), View(1))
    assert drawn == [tuple(s["site"] for s in r["sites"]) for r in again]


def test_all_sites_share_one_base_model(settings, monkeypatch):
    loaded = []
    original = site_runtime.load_base
    site_runtime._runtime.cache_clear()
    monkeypatch.setattr(site_runtime, "load_base", lambda s: loaded.append(1) or original(s))
    simulate(settings(partition="iid", num_clients=5), View(1))
    assert len(loaded) == 1


def test_the_round_goes_on_without_a_site_that_fails(settings, monkeypatch):
    from fedfora.federated.site import client_app

    original = client_app.train_round

    def fail(runtime, site, *args, **kwargs):
        if site.name == "neurology":
            raise RuntimeError("disk full")
        return original(runtime, site, *args, **kwargs)

    monkeypatch.setattr(client_app, "train_round", fail)
    rounds = simulate(settings(num_rounds=1), View(1))
    assert [s["site"] for s in rounds[0]["sites"]] == [
        "cardiology",
        "dermatology",
        "gastroenterology",
    ]
    assert rounds[0]["rejected"] == [
        {"site": "neurology", "reason": "error 2: RuntimeError: disk full"}
    ]


@pytest.mark.parametrize(
    "private",
    [{}, *({"privacy_unit": unit, "noise_multiplier": 1.0} for unit in ("record", "site"))],
)
def test_while_a_round_is_on_its_sites_can_be_seen_from_outside(
    private, settings, tmp_path, monkeypatch
):
    """Who takes part, who trains, who has sent; no loss and no count where they are hidden."""
    monkeypatch.setattr("fedfora.federated.simulation.STEP_SHOWN_S", 0.0)
    view, seen = View(1), []
    follower = Follower(tmp_path / "out", PASSING)

    def look(event):
        seen.extend(follower.new())

    monkeypatch.setattr(view, "take", look)
    simulate(settings(num_rounds=2, clients_per_round=2, local_steps=1, **private), view)
    for start, *others in (seen[:5], seen[5:]):
        assert start["event"] == "round_started"
        for site in start["sites"]:
            kinds = [event["event"] for event in others if event["site"] == site]
            assert kinds == ["site_step", "site_sent"]
        assert all(event["steps"] == 1 for event in others)
    assert all(("loss" in event) == (not private) for event in seen if "site" in event)
    assert all(bool(event["tokens"]) == (not private) for event in seen if "tokens" in event)
    assert not (tmp_path / "out" / PASSING).exists()


def test_a_round_without_any_reply_stops_the_run_with_a_reason(settings, monkeypatch):
    from fedfora.federated.site import client_app

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(client_app, "train_round", fail)
    with pytest.raises(ValueError, match="round 1: no site sent a usable update"):
        simulate(settings(), View(1))


def test_an_earlier_run_is_not_overwritten_unless_asked(settings, tmp_path):
    simulate(settings(num_rounds=1), View(1))
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        simulate(settings(num_rounds=1, seed=9), View(1))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    simulate(settings(num_rounds=1, seed=9, overwrite_output_dir=True), View(1))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before
    assert len(read_rounds(Path(tmp_path / "out"))) == 1


def test_canaries_go_to_one_site_and_none_is_kept_back(settings):
    plain = settings(validation_fraction=0.5)
    with_them = settings(canaries=2, canary_copies=2, canary_site=1, validation_fraction=0.5)
    for index, more in ((0, 0), (1, 4)):
        before = open_site(load_runtime(plain.run_config()), index)
        after = open_site(load_runtime(with_them.run_config()), index)
        assert after.validation == before.validation
        assert after.encoded[: len(before.encoded)] == before.encoded
        assert len(after.encoded) == len(before.encoded) + more
    with pytest.raises(ValueError, match="--canary_site 9"):
        site_rows(settings(canaries=1, canary_site=9))
