"""A real site's identity comes from its administrator's files; a simulated one's from the seed."""

import base64
import json

import pytest
import torch

from fedfora.adapter.state import fold
from fedfora.federated.coordinator.rounds import run_rounds
from fedfora.federated.embedded import EmbeddedGrid
from fedfora.federated.secure_aggregation import client
from fedfora.federated.secure_aggregation.crypto import verify_participation
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.federated.site.client_app import make_client_app
from fedfora.federated.site.identity import (
    open_identity,
    read_site_keys,
    sign_part,
    simulated_identity,
)
from fedfora.federated.site.memory import AnsweredRounds
from fedfora.models.saving import read_adapter
from fedfora.protection.keys import key_id, make_signing_key, read_signing_key
from fedfora.reporting.view import View

NUM_SITES = 4


def run(node_configs, run_config):
    """Run a federation of sites whose administrators wrote these configurations."""
    grid = EmbeddedGrid(make_client_app(), node_configs, run_config)
    run_rounds(grid, run_config)


def test_files_name_the_site_and_whom_it_knows(node_configs):
    identity, pinned = open_identity(node_configs[2], seed=1)
    assert identity.public_bytes == pinned[2]
    assert sorted(pinned) == [0, 1, 2, 3]
    assert len(set(pinned.values())) == NUM_SITES


def test_simulated_sites_know_each_other_from_the_seed():
    config = {"partition-id": 1, "num-partitions": 3}
    identity, pinned = open_identity(config, seed=5)
    assert identity.public_bytes == pinned[1] == simulated_identity(5, 1).public_bytes
    assert pinned != open_identity(config, seed=6)[1]


def test_one_file_without_the_other_is_refused(node_configs):
    for name in ("signing-key", "site-keys", "site-state"):
        config = {key: value for key, value in node_configs[0].items() if key != name}
        with pytest.raises(ValueError, match=f"but not {name}"):
            open_identity(config, seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "not an object of site keys"),
        ("{", "not an object of site keys"),
        ('{"a": "AAAA"}', "not an object of site keys"),
        ('{"0": "?"}', "not an object of site keys"),
        ('{"0": 7}', "not an object of site keys"),
        ('{"0": "AAAA"}', r"sites \[0\] are not 32 bytes"),
        (json.dumps(dict.fromkeys("01", base64.b64encode(bytes(32)).decode())), "the same key"),
    ],
)
def test_site_keys_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_site_keys(tmp_path / "keys.json")


def test_missing_site_keys_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"keys\.json"):
        read_site_keys(tmp_path / "keys.json")


def test_sites_with_provisioned_keys_come_to_what_simulated_ones_come_to(
    node_configs, run_config, tmp_path, monkeypatch
):
    """But for the order of rows, which a real site draws from a secret of its own."""
    monkeypatch.setattr(AnsweredRounds, "seed", lambda *args, **kwargs: None)
    run(node_configs, run_config)
    real = fold(read_adapter(tmp_path / "out"))
    simulate(from_run_config({**run_config, "output_dir": str(tmp_path / "simulated")}), View(1))
    simulated = fold(read_adapter(tmp_path / "simulated"))
    assert all(torch.equal(value, simulated[name]) for name, value in real.items())


def test_a_site_that_others_do_not_know_stops_the_run_which_names_it(
    node_configs, run_config, tmp_path
):
    make_signing_key(tmp_path / "stranger.pem")
    node_configs[3]["signing-key"] = str(tmp_path / "stranger.pem")
    with pytest.raises(ValueError, match="site 3 is not signed with that site's identity"):
        run(node_configs, run_config)


def test_provisioned_sites_do_not_train_for_a_run_in_the_clear(node_configs, run_config):
    in_clear = {key: value for key, value in run_config.items() if key != "secure_aggregation"}
    with pytest.raises(ValueError, match="sends no update without --secure_aggregation"):
        run(node_configs, in_clear)


def test_no_key_and_no_seed_of_a_run_is_written_down(
    node_configs, run_config, tmp_path, monkeypatch
):
    made = []

    def spied(original):
        def spy():
            made.append(original())
            return made[-1]

        return spy

    for name in ("new_private_key", "new_secret"):
        monkeypatch.setattr(client, name, spied(getattr(client, name)))
    run(node_configs, run_config)
    assert len(read_rounds(tmp_path / "out")) == 1
    keys = [read_signing_key(tmp_path / f"site-{index}.pem") for index in range(NUM_SITES)]
    secrets = [key.private_bytes_raw() for key in keys] + made
    assert len(made) == 3 * NUM_SITES  # a key of the run, a key and a seed of the round
    secrets += [secret.hex().encode() for secret in secrets]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(
                secret in content or secret.hex().encode() in content for secret in secrets
            )


def test_provenance_names_the_keys_of_the_sites_that_took_part(
    node_configs, run_config, tmp_path, monkeypatch
):
    make_signing_key(tmp_path / "owner.pem")
    monkeypatch.setenv("FEDFORA_SIGNING_KEY", str(tmp_path / "owner.pem"))
    run(node_configs, run_config)
    content = json.loads((tmp_path / "out" / "provenance.json").read_text())
    public = json.loads((tmp_path / "sites.json").read_text()).values()
    expected = [key_id(base64.b64decode(key)) for key in public]
    assert sorted(content["statement"]["facts"]["site_keys"]) == sorted(expected)


def test_a_signature_of_another_site_or_for_another_base_is_none(node_configs):
    part = sign_part(node_configs[1], 1, "base")
    public, signature = part["public-key"], part["signature"]
    other = sign_part(node_configs[2], 1, "base")["public-key"]
    assert verify_participation(public, signature, 1, "base") == key_id(public)
    for wrong in ((other, signature, 1, "base"), (public, signature, 2, "base")):
        with pytest.raises(ValueError, match="did not sign"):
            verify_participation(*wrong)
    for wrong in (2**40, "key", [1], None, public[:9]):  # not even bytes: read as none, not as many
        with pytest.raises(ValueError, match="site 1 did not sign"):
            verify_participation(wrong, signature, 1, "base")
        with pytest.raises(ValueError, match="site 1 did not sign"):
            verify_participation(public, wrong, 1, "base")
    with pytest.raises(ValueError, match="site 1 did not sign"):
        verify_participation(public, signature, 1, "another base")
    assert sign_part({"partition-id": 0}, 0, "base") == {}
