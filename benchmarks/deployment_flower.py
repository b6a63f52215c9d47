"""A round of Flower's own FedAvg on real processes, beside which `deployment.py` can be read.

Two SuperNodes on loopback with TLS and nothing in between, no node keys, no gate; clients that add
one to what they receive. As many numbers as the adapter of `deployment.py` has: once as one array
for each of 448 tensors, as Flower's examples send an adapter, and once as a single array.

    OMP_NUM_THREADS=1 python benchmarks/deployment_flower.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from fedfora.deployment.flower_processes import (
    FlowerCommand,
    FlowerCommandError,
    environment,
    free_port,
)
from fedfora.deployment.provision import provision
from fedfora.deployment.settings import ProvisionArguments
from fedfora.deployment.sites_file import read_sites_file
from fedfora.deployment.supervisor import Child, Supervisor
from record import write

NUMBERS = 4_800_000
TENSORS = (448, 1)
NODES = 2
SERVER = """
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    size = config["numbers"] // config["tensors"]
    draw = np.random.default_rng(0).random  # Flower sends equal pieces once
    first = {f"t{i}": draw(size, np.float32) for i in range(config["tensors"])}
    times = []

    class Timed(FedAvg):
        def configure_train(self, *args):
            times.append(time.time())
            return super().configure_train(*args)

    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    arrays = ArrayRecord({name: Array(value) for name, value in first.items()})
    result = strategy.start(grid, arrays, num_rounds=config["rounds"], timeout=1200)
    times.append(time.time())
    for name, value in first.items():
        assert np.allclose(result.arrays[name].numpy(), value + config["rounds"], atol=1e-4)
    Path(config["times"]).write_text(json.dumps(times))
"""
CLIENT = """
from flwr.app import ArrayRecord, Array, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    arrays = {name: Array(a.numpy() + 1) for name, a in message.content["arrays"].items()}
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content, reply_to=message)
"""


def write_app(directory: Path, config: dict[str, Any]) -> None:
    """Write the Flower app and its settings."""
    package = directory / "plain"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "server.py").write_text(SERVER)
    (package / "client.py").write_text(CLIENT)
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
    (directory / "pyproject.toml").write_text(
        '[project]\nname = "plain"\nversion = "1.0.0"\ndescription = "FedAvg"\n'
        'license = "Apache-2.0"\ndependencies = []\n\n[build-system]\n'
        'requires = ["hatchling"]\nbuild-backend = "hatchling.build"\n\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["."]\n\n[tool.flwr.app]\n'
        'publisher = "plain"\n\n[tool.flwr.app.components]\nserverapp = "plain.server:app"\n'
        'clientapp = "plain.client:app"\n\n[tool.flwr.app.config]\n' + settings
    )


def rounds(place: Path, tensors: int, num_rounds: int) -> list[float]:
    """Run a federation and return the seconds of each round but the first."""
    plan = place / "sites.yaml"
    port = free_port()
    address = {"host": "127.0.0.1", "port": free_port(), "superlink_port": port}
    own = {"train_file": "clinic", "model_name_or_path": "clinic-base"}
    content = {"federation": "plain", "coordinator": address, "sites": {"one": own, "two": own}}
    plan.write_text(yaml.safe_dump(content))
    into = ProvisionArguments(output_dir=str(place / "kits"))
    kit = provision(read_sites_file(plan), into).kit  # for its certificates
    flower = FlowerCommand(place / "home", port, kit.authority)
    flower.write_configuration()
    times = place / "times.json"
    config = {"numbers": NUMBERS, "tensors": tensors, "rounds": num_rounds, "times": str(times)}
    write_app(place / "app", config)
    with ExitStack() as running:
        running.enter_context(Supervisor(children(place, port, kit), print).running())
        run(flower, place / "app")
        while not times.is_file():
            time.sleep(1)
    marks = json.loads(times.read_text())
    return [after - before for before, after in pairwise(marks)][1:]


def children(place: Path, port: int, kit: Any) -> list[Child]:
    """Return a SuperLink and the SuperNodes."""
    beside = Path(sys.executable).parent
    link = [str(beside / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]
    link += ["--ssl-ca-certfile", str(kit.authority), "--ssl-certfile", str(kit.server_certificate)]
    link += ["--ssl-keyfile", str(kit.server_key), "--disable-runtime-dependency-installation"]
    found = [Child("SuperLink", lambda: link, place / "link.log", environment(place / "home"))]
    for node in range(NODES):
        words = [str(beside / "flower-supernode"), "--superlink", f"127.0.0.1:{port}"]
        words += ["--root-certificates", str(kit.authority)]
        words += ["--host", "127.0.0.1", "--port", str(free_port())]
        own = environment(place / f"node-{node}")
        log = place / f"node-{node}.log"
        found.append(Child(f"SuperNode {node}", lambda words=words: words, log, own))  # type: ignore[misc]
    return found


def run(flower: FlowerCommand, app: Path) -> None:
    """Start the run, as soon as the SuperLink takes it."""
    for _ in range(60):
        try:
            flower.start(app)
        except FlowerCommandError:
            time.sleep(2)
        else:
            return
    raise TimeoutError("the SuperLink takes no run")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tensors", type=int, help="do this one case, and print its seconds")
    arguments = parser.parse_args()
    if arguments.tensors:
        with tempfile.TemporaryDirectory(prefix="fedfora-bench-") as place:
            print(json.dumps(rounds(Path(place), arguments.tensors, arguments.rounds)))
        return
    figures: dict[str, Any] = {"bytes": 4 * NUMBERS, "nodes": NODES, "seconds_per_round": {}}
    for tensors in TENSORS:  # each in a process of its own, as Flower's command wants
        words = [sys.executable, __file__, "--rounds", str(arguments.rounds)]
        words += ["--tensors", str(tensors)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        seconds = json.loads(done.stdout.splitlines()[-1])
        spread = {"median": median(seconds), "min": min(seconds), "max": max(seconds)}
        figures["seconds_per_round"][f"{tensors} arrays"] = spread
        write("deployment_flower", figures)


if __name__ == "__main__":
    main()
