"""Engines by name: what carries messages between the coordinator and the simulated sites.

The apps do not know which one runs them, and replies are folded in the order of the sites, so the
same seed is to give the same adapter to the bit in every engine
(tests/federated/engines/test_engines.py).
"""

from collections.abc import Callable, Mapping

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedfora.config import Scalar
from fedfora.federated.engines.embedded import run_embedded
from fedfora.federated.engines.ray import run_ray
from fedfora.registry import Registry

Engine = Callable[[ServerApp, ClientApp, int, Mapping[str, Scalar]], None]

ENGINES: Registry[Engine] = Registry("engine")
ENGINES.add("embedded", run_embedded)
ENGINES.add("ray", run_ray)
