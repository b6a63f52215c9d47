"""What fedfora takes from inside Flower is there; another version fails here, and says where.

Each test names what would no longer hold at a site or at the coordinator.
"""

import inspect
import sys
from importlib.metadata import version
from types import ModuleType

import pytest
from flwr.app import Message, RecordDict

from fedfora.deployment import flower_processes
from fedfora.deployment.flower_processes import KNOWN_TO_WORK, SHIM, environment
from fedfora.federated.engines.embedded import introduce_this_process

HERE = f"flwr {version('flwr')} (the real processes were tried with {KNOWN_TO_WORK})"


def test_the_code_of_a_run_can_be_kept_from_being_run_at_a_site():
    from flwr.supernode.runtime import run_clientapp

    program = inspect.getsource(run_clientapp.run_clientapp)
    for name in ("install_from_fab", "get_project_dir", "get_load_client_app_fn"):
        assert hasattr(run_clientapp, name), f"{HERE}: no {name}"
        assert f"{name}(" in program, f"{HERE}: run_clientapp does not call {name}"


def test_the_program_that_stands_for_flowers_client_has_the_name_that_is_looked_for():
    from flwr.supercore import constant

    assert SHIM in inspect.getsource(constant), f"{HERE}: no program is called {SHIM}"


def test_the_client_is_loaded_without_the_supernode_beside_it():
    from flwr.supernode import cli

    names = "from .flower_supernode import flower_supernode"
    assert names in inspect.getsource(cli), f"{HERE}: spare the stand-in in flower_processes"


def test_flower_reads_the_variables_that_keep_it_quiet():
    from flwr.common import constant as common
    from flwr.supercore import constant, telemetry
    from flwr.supercore.superexec import run_superexec

    text = "".join(map(inspect.getsource, (common, constant, telemetry, run_superexec)))
    for name in environment("/nowhere").keys() - {"PATH"}:
        assert name in text, f"{HERE}: nobody reads {name}"


def test_a_message_takes_the_id_that_a_grid_gives_it():
    introduce_this_process()
    message = Message(RecordDict(), dst_node_id=1, message_type="query")
    message.metadata.__dict__["_message_id"] = "7"
    assert message.metadata.message_id == "7", f"{HERE}: set a message's id in another way"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "7", HERE


def test_another_flower_is_refused_by_name_and_nothing_is_run(monkeypatch):
    from flwr.supernode import runtime

    other = ModuleType("flwr.supernode.runtime.run_clientapp")
    other.install_from_fab = other.get_load_client_app_fn = None
    monkeypatch.setattr(runtime, "run_clientapp", other, raising=False)
    monkeypatch.setitem(sys.modules, other.__name__, other)
    with pytest.raises(RuntimeError, match="has no get_project_dir in flwr") as refused:
        flower_processes.clientapp()
    assert version("flwr") in str(refused.value)
    assert f"flwr=={KNOWN_TO_WORK}" in str(refused.value)
