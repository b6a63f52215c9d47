"""The example and what a run ships are the same files; no setting of anybody's own is in them."""

import tomllib
from pathlib import Path

from fedfora.deployment.flower_app import write_app
from fedfora.federated.settings import from_run_config
from fedfora.federated.settings_scope import common_part

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_app"


def config():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    return project["tool"]["flwr"]["app"]["config"]


def test_the_example_is_what_a_run_ships(tmp_path):
    write_app(tmp_path, config())
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*")}
    kept = {
        p.relative_to(EXAMPLE): p.read_text() for p in EXAMPLE.rglob("*.*") if p.suffix != ".pyc"
    }
    assert written == kept


def test_its_settings_are_those_that_travel():
    assert common_part(config()) == config()
    assert from_run_config(config()).federation.num_rounds == config()["num_rounds"]
