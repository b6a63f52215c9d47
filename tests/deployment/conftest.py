"""A sites file, and the kits made from it."""

import pytest
import yaml

pytest.importorskip("cryptography", reason='needs pip install "fedfora[privacy]"')

from fedfora.deployment.provision import provision
from fedfora.deployment.sites_file import read_sites_file

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
        return provision(plan, tmp_path / "kits", revoke=revoke, renew=renew)

    return make
