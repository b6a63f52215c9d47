"""A sites file and the kits made from it; federations of real processes."""

import json

import pytest
import yaml
from safetensors.torch import load_file

pytest.importorskip("cryptography", reason='needs pip install "fedfora[privacy]"')

from fedfora.data.clinic import clinic_rows
from fedfora.deployment.provision import provision
from fedfora.deployment.settings import ProvisionArguments
from fedfora.deployment.sites_file import read_sites_file
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import simulate
from fedfora.reporting.view import View
from real_federation import FLAGS, RealFederation

PLAN = {
    "federation": "clinics",
    "coordinator": {"host": "127.0.0.1", "port": 18443},
    "settings": {"num_rounds": 3, "model_name_or_path": "clinic-base"},
    "sites": {
        "cardiology": {"train_file": "/data/notes.json"},
        "dermatology": {"train_file": "/data/notes.json", "device": "cpu"},
    },
}


@pytest.fixture
def sites_file(tmp_path):
    """A function that writes a sites.yaml, some of its keys changed or (None) left out."""

    def write(**changes):
        plan = {key: value for key, value in {**PLAN, **changes}.items() if value is not None}
        path = tmp_path / "sites.yaml"
        path.write_text(yaml.safe_dump(plan, sort_keys=False))
        return path

    return write


@pytest.fixture
def provisioned(sites_file, tmp_path):
    """A function that provisions into the same directory each time."""

    def make(revoke=None, renew=False, **changes):
        plan = read_sites_file(sites_file(**changes))
        return provision(
            plan, ProvisionArguments(output_dir=str(tmp_path / "kits"), revoke=revoke, renew=renew)
        )

    return make


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Ten notes of each of some clinics, in a file for each, and all of them in one."""
    directory = tmp_path_factory.mktemp("rows")
    by_clinic = {}
    for row in clinic_rows():
        by_clinic.setdefault(row["specialty"], []).append(row)
    files = {}
    for name, notes in by_clinic.items():
        files[name] = directory / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in notes[:10]))
    return files


@pytest.fixture
def federation(tmp_path, tiny_dir, rows):
    """A function from site names and flags to a federation; its processes end with the test."""
    made = []

    def make(count, quorum=1, own=None, **flags):
        chosen = sorted(rows)[:count]
        sites = {
            name: {
                "train_file": str(rows[name]),
                "model_name_or_path": tiny_dir,
                **(own or {}).get(name, {}),
            }
            for name in chosen
        }
        place = tmp_path / f"federation-{len(made)}"
        place.mkdir()
        made.append(RealFederation(place, {**FLAGS, **flags}, sites, quorum))
        made[-1].names = chosen
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def embedded(tmp_path, tiny_dir, rows):
    """A function that simulates the first sites and returns the adapter."""

    def run(count, **flags):
        path = tmp_path / "all.jsonl"
        path.write_text("".join(rows[name].read_text() for name in sorted(rows)[:count]))
        output_dir = tmp_path / "embedded"
        settings = {
            **FLAGS,
            "train_file": str(path),
            "partition": "by-column:specialty",
            "model_name_or_path": tiny_dir,
            "output_dir": str(output_dir),
            "overwrite_output_dir": True,
            **flags,
        }
        simulate(from_run_config(settings), View(1))
        return load_file(output_dir / "adapter_model.safetensors")

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Let `-m "not slow"` leave out the real federations, too."""
    for item in items:
        if item.get_closest_marker("deploy"):
            item.add_marker(pytest.mark.slow)
