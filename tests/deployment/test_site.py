"""What a site's processes load: the daemon next to nothing, the trainer what training takes."""

import importlib.util
import json
import subprocess
import sys

import pytest

from fedfora.deployment.site import hide_packages

MODELS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl")
FLOWER = ("flwr", "grpc")
SPARE = ("datasets", "pandas", "pyarrow", "scipy", "sklearn", "trl")
DAEMON = """
import fedfora.cli.site, fedfora.deployment.site
from fedfora.deployment.kit import SiteKit, read_kit
read_kit(KIT, SiteKit)
"""
SUPERNODE = (
    "import fedfora.deployment.flower_processes, fedfora.deployment.client_app\n"
    "import flwr.supernode.cli.flower_supernode, flwr.supernode.runtime.run_clientapp"
)
TRAINER = """
from fedfora.deployment import site
try:
    site.main("/nowhere")
except ValueError as error:  # no kit there; by then all is loaded
    assert "no kit" in str(error)
assert "fedfora.deployment.trainer" in __import__("sys").modules
"""


def loaded(program, kit):
    """Names of all modules that a program loads."""
    told = "import sys, json; print(json.dumps(list(sys.modules)))"
    code = f"KIT = {str(kit)!r}\n{program}\n{told}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("program", "forbidden", "most"),
    [
        (DAEMON, (*MODELS, *FLOWER), 550),
        (SUPERNODE, MODELS, 2000),
        (TRAINER, SPARE, 4500),
    ],
    ids=["daemon", "SuperNode", "trainer"],
)
def test_a_process_loads_no_library_that_it_can_do_without(provisioned, program, forbidden, most):
    kit = provisioned().place / "sites" / "cardiology"
    modules = loaded(program, kit)
    assert not [name for name in forbidden if name in modules]
    assert len(modules) <= most


def test_a_package_is_absent_for_a_while_and_there_again():
    assert "wave" not in sys.modules
    with hide_packages("wave", "json"):
        assert importlib.util.find_spec("wave") is None
        with pytest.raises(ModuleNotFoundError):
            import wave
        import json as loaded_before

        assert loaded_before is json
    import wave

    assert wave.open
