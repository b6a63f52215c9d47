"""The same federation in every engine: the same adapter to the bit, from one base per process."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fedfora.federated.engines.ray import check_ray
from fedfora.federated.simulation import read_rounds

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='needs ray: pip install "fedfora[simulation]"'
)

# In a process of its own: Flower's simulation leaves threads and loggers behind.
PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)  # as many in every engine, or the sums differ
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import simulate
from fedfora.reporting.view import View
try:
    simulate(from_run_config(json.loads(sys.argv[1])), View(1))
except ValueError as error:
    print("ValueError:", error)
"""


def in_a_process(settings, **environment):
    chosen = json.dumps(settings.run_config())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, chosen],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@with_ray
def test_ray_gives_the_embedded_engines_adapter_to_the_bit(settings, tmp_path):
    """With sampling, validation, error feedback at the sites and moments at the server.

    And every actor loads the base once for all sites and rounds: it opens the base's config.json as
    often as the one process of the embedded engine does, for more sites and rounds than actors.
    """
    flags = {
        "partition": "iid",
        "num_clients": 5,
        "clients_per_round": 4,
        "num_rounds": 3,
        "validation_fraction": 0.2,
        "update_dtype": "int8",
        "server_optimizer": "adam",
        "server_learning_rate": 0.1,
        "lora_dropout": 0.1,
    }
    opened = {}
    for engine in ("embedded", "ray"):
        chosen = settings(**flags, engine=engine, output_dir=str(tmp_path / engine))
        said = in_a_process(chosen, PYTHONPATH=noting_opens(tmp_path / f"{engine}-opens"))
        assert "round 3/3" in said, said
        processes = (tmp_path / f"{engine}-opens" / "processes").read_text().split()
        opened[engine] = {processes.count(process) for process in processes}
    assert opened["ray"] == opened["embedded"]
    assert len(opened["ray"]) == 1
    for place in ("", "best"):
        one, other = (
            load_file(tmp_path / run / place / "adapter_model.safetensors")
            for run in ("embedded", "ray")
        )
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    losses = [[r["loss"] for r in read_rounds(tmp_path / run)] for run in ("embedded", "ray")]
    assert losses[0] == losses[1]


def noting_opens(directory):
    """Return a PYTHONPATH with which every process notes itself when it opens the base's config."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"log = os.open({str(directory / 'processes')!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "def note(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('tiny-base0/config.json'):\n"
        "        os.write(log, f'{os.getpid()}\\n'.encode())\n"
        "sys.addaudithook(note)\n"
    )
    return os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])


def test_without_ray_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "fedfora\[simulation\]"'):
        check_ray()
