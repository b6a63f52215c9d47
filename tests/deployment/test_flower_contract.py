"""What fedfora takes from inside Flower is there; another version fails here, and says where.

Each test names what would no longer hold at a site or at the coordinator.
"""

import hashlib
import inspect
import io
import ssl
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedfora.deployment import flower_processes, journal
from fedfora.deployment.flower_processes import KNOWN_TO_WORK, environment
from fedfora.deployment.run import write_app
from fedfora.federated.embedded import introduce_this_process

HERE = f"flwr {version('flwr')} (the real processes were tried with {KNOWN_TO_WORK})"

LOOP = import_module("flwr.supernode.start_client_internal")


def test_the_code_of_a_run_can_be_kept_from_being_run_at_a_site():
    from flwr.supernode.runtime import run_clientapp

    program = inspect.getsource(run_clientapp.run_clientapp)
    for name in ("install_from_fab", "get_project_dir", "get_load_client_app_fn"):
        assert hasattr(run_clientapp, name), f"{HERE}: no {name}"
        assert f"{name}(" in program, f"{HERE}: run_clientapp does not call {name}"


def test_each_kind_of_task_is_known_and_all_but_a_serverapps_run_is_refused(
    supernode_pulls, tmp_path, monkeypatch
):
    """An AgentApp's run was run at every site: Flower has a program for each kind of task.

    Each refusal is an alarm in the site's journal.
    """
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    known = {"serverapp", "clientapp", "simulation", "agentapp", "model", "connector"}
    assert {str(kind) for kind in TaskType} == {f"flwr-{name}" for name in known}, HERE
    assert set(TASK_TYPE_TO_COMMAND) == set(TaskType), HERE
    monkeypatch.setenv(journal.STATE, str(tmp_path / "state"))
    kinds = [*TaskType, "", "flwr-new"]
    for kind in kinds:
        fetched, tasks = supernode_pulls(str(kind))
        if kind == TaskType.SERVER_APP:
            assert (fetched, tasks) == (True, ["flwr-clientapp"])
        else:
            assert (fetched, tasks) == (False, []), f"{HERE}: {kind}"
    alarms = journal.read_journal(tmp_path / "state")
    assert {(line["event"], line["alarm"]) for line in alarms} == {("refused_run", True)}
    assert [line["kind"] for line in alarms] == [str(k) for k in kinds if k != TaskType.SERVER_APP]


@pytest.fixture
def supernode_pulls(tmp_path):
    """A function that lets a SuperNode pull a message of a run with some type of task.

    Returns whether it fetched the run's code, and the types of the tasks that it made.
    """
    from flwr.app import ConfigRecord
    from flwr.supercore.fab import Fab
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
    )
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.run import Run
    from flwr.supernode.nodestate import NodeStateFactory

    guarded = flower_processes.refuse_other_runs(
        LOOP._pull_and_store_message, LOOP.RunNotRunningException
    )

    write_app(tmp_path, {"num_rounds": 1})
    with ZipFile(tmp_path / "app.fab", "w") as archive:
        archive.write(tmp_path / "pyproject.toml", "pyproject.toml")
    content = (tmp_path / "app.fab").read_bytes()
    code = Fab(hashlib.sha256(content).hexdigest(), content, {})

    def pull(kind):
        introduce_this_process()
        message = Message(RecordDict({"x": ConfigRecord({"a": 1})}), 1, "query")
        message.metadata.__dict__["_run_id"] = 7
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        run = Run.create_empty(7)
        run.primary_task_type, run.fab_hash, run.series_id = kind, code.hash_str, 1
        store = ObjectStoreFactory()
        state, fetched = NodeStateFactory(objectstore_factory=store).state(), []
        state.set_node_id(1)
        guarded(
            state=state,
            object_store=store.store(),
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=lambda run_id: run,
            get_fab=lambda *which: fetched.append(which) or code,
            pull_object=lambda run_id, name: objects[name].deflate(),
            confirm_message_received=lambda *which: None,
            trusted_entities=None,
        )
        return bool(fetched), [task.type for task in state.get_tasks()]

    return pull


def test_flower_starts_no_program_beside_a_supernode_that_isolates_its_clients():
    program = import_module("flwr.supernode.cli.flower_supernode")
    assert "start_client_internal(" in inspect.getsource(program), HERE
    program = inspect.getsource(LOOP.start_client_internal)
    assert program.count("Popen(") == 1, HERE
    before, _, inside = program.partition(
        "if isolation == ISOLATION_MODE_SUBPROCESS:\n        runtime"
    )
    assert "Popen" not in before, HERE
    assert "Popen" in inside.partition("with _init_connection")[0], HERE
    assert "_pull_and_store_message(" in program, HERE
    assert "get_run=get_run" in program, HERE


def grid_that_pulls(replies):
    """Flower's Grid with a SuperLink that has these replies, as object trees and contents."""
    from flwr.common.serde import message_to_proto
    from flwr.proto.message_pb2 import PullObjectResponse
    from flwr.proto.runtime_pb2 import PullAppMessagesResponse
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
    )
    from flwr.supercore.run import Run
    from flwr.superlink.grid.http_grid import HttpGrid

    contents, answer = {}, PullAppMessagesResponse()
    for message in replies:
        message.metadata.__dict__["_message_id"] = message.object_id
        contents |= {k: v.deflate() for k, v in get_all_nested_objects(message).items()}
        answer.messages_list.append(message_to_proto(message))
        answer.message_object_trees.append(get_object_tree(message))
    grid, pulled = HttpGrid(token="x"), []

    def pull_object(request):
        pulled.append(len(contents[request.object_id]))
        content = contents[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    grid._client = SimpleNamespace(
        PullMessages=lambda request: answer,
        PullObject=pull_object,
        ConfirmMessageReceived=lambda request: None,
    )
    grid.set_run(Run.create_empty(7))
    return grid, contents, pulled


@pytest.fixture
def bound(monkeypatch):
    """A bound that is in Flower's Grid for one test."""
    grid = import_module("flwr.superlink.grid.http_grid")
    for name in ("pull_objects", "inflate_object_from_contents"):
        monkeypatch.setattr(grid, name, getattr(grid, name))
    bound = flower_processes.ReplyBound()
    bound.install()
    return bound


def reply_of(array):
    introduce_this_process()
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "7"
    content = RecordDict({"arrays": ArrayRecord({"numbers": Array(array)})})
    return Message(content, reply_to=message)


def test_a_reply_that_is_much_larger_than_an_adapter_is_not_pulled_to_its_end(bound):
    """One of 600 MB cost the coordinator 3 GB before it was refused."""
    bound.agreed(1000)
    large = np.random.default_rng(0).random(8 << 20)  # 64 MiB, in pieces of 5 MB
    grid, contents, pulled = grid_that_pulls([reply_of(large), reply_of(np.ones(3))])
    refused, taken = grid.pull_messages(["7"])
    assert "it has more than" in refused.error.reason
    assert refused.metadata.reply_to_message_id == "7"
    assert sum(pulled) < bound.most_bytes + 20e6 < sum(map(len, contents.values()))
    assert list(taken.content["arrays"]["numbers"].numpy()) == [1, 1, 1]


def test_a_reply_that_cannot_be_read_is_its_sites_error_and_does_not_end_the_run(bound):
    grid, contents, _ = grid_that_pulls([reply_of(np.zeros(3)), reply_of(np.ones(3))])
    spoiled = next(name for name in contents if contents[name].startswith(b"ArrayRecord"))
    contents[spoiled] = b"Nothing 0 0" + bytes(8)
    refused, taken = grid.pull_messages(["7"])
    assert "it cannot be read" in refused.error.reason
    assert list(taken.content["arrays"]["numbers"].numpy()) == [1, 1, 1]


def test_flower_reads_the_variables_that_keep_it_quiet():
    from flwr.common import constant as common
    from flwr.supercore import constant, telemetry
    from flwr.supercore.superexec import run_superexec

    text = "".join(map(inspect.getsource, (common, constant, telemetry, run_superexec)))
    for name in environment("/nowhere").keys() - {"PATH", "NO_PROXY", "no_proxy"}:
        assert name in text, f"{HERE}: nobody reads {name}"


def test_records_pass_through_flowers_own_serialization():
    """It carries them over the trainer's socket."""
    serde = import_module("flwr.common.serde")
    proto = import_module("flwr.proto.recorddict_pb2").RecordDict
    for name in ("recorddict_to_proto", "recorddict_from_proto"):
        assert hasattr(serde, name), f"{HERE}: no {name}"
    content = RecordDict({"a": ArrayRecord({"x": Array(np.ones(2))})})
    frame = serde.recorddict_to_proto(content).SerializeToString()
    assert serde.recorddict_from_proto(proto.FromString(frame)) == content, HERE


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


def test_a_client_unpacks_and_imports_nothing_of_what_came_with_a_run(monkeypatch):
    """Its token comes by standard input, and nothing is installed for it."""
    from flwr.supernode import runtime

    from fedfora.deployment import client_app, supervisor

    other, used = ModuleType("flwr.supernode.runtime.run_clientapp"), {}

    def came(*args, **kwargs):
        raise AssertionError("code of the run is used")

    def run(**options):
        other.install_from_fab("fab")
        app = other.get_load_client_app_fn(app_dir=other.get_project_dir("fab"))("id", "1.0")
        used.update(options, app=app)

    other.install_from_fab = other.get_project_dir = other.get_load_client_app_fn = came
    other.run_clientapp = run
    monkeypatch.setattr(runtime, "run_clientapp", other, raising=False)
    monkeypatch.setitem(sys.modules, other.__name__, other)
    monkeypatch.setattr(supervisor, "exit_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["clientapp", "127.0.0.1:1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("token"))
    flower_processes.clientapp()
    assert used["app"] is client_app.app
    assert (used["token"], used["runtime_dependency_install"]) == ("token", False)
    installs = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
    assert environment(Path("home"))[installs] == "1"


def test_a_supernode_listens_on_loopback_starts_nothing_and_knows_its_own_secret(monkeypatch):
    program = import_module("flwr.supernode.cli.flower_supernode")
    seen, pull = [], LOOP._pull_and_store_message

    def starts():
        options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
        secret = Path(options["--superexec-auth-secret-file"]).read_bytes()
        seen.append((options["--host"], options["--isolation"], len(secret)))
        assert LOOP._pull_and_store_message is not pull  # the refusal of other runs is on

    monkeypatch.setattr(LOOP, "_pull_and_store_message", pull)
    monkeypatch.setattr(program, "start_client_internal", program.start_client_internal)
    monkeypatch.setattr(program, "flower_supernode", starts)
    monkeypatch.setattr(sys, "argv", ["supernode"])
    monkeypatch.setattr(flower_processes.os, "_exit", seen.append)
    flower_processes.supernode()
    assert seen == [("127.0.0.1", "process", 32), 1]


def test_a_site_asks_for_clients_tasks_alone_and_shows_no_token(monkeypatch):
    """A list of processes is for every account to read."""
    from flwr.supercore.runtime import RuntimeHttpClient

    class Api:
        def AcquireTask(self, wanted):
            asked.append(list(wanted.supported_task_types))
            if len(asked) > 1:
                raise ConnectionError
            return SimpleNamespace(token="the token")

    class Client(io.BytesIO):
        def __init__(self, words, *, stdin):
            started.append(words)
            self.stdin = self

        def write(self, text):
            started.append(text)

    asked, started, ended = [], [], []
    monkeypatch.setattr(RuntimeHttpClient, "from_server_address", lambda **options: Api())
    monkeypatch.setattr(flower_processes.subprocess, "Popen", Client)
    monkeypatch.setattr(Client, "poll", lambda self: None, raising=False)
    monkeypatch.setattr(flower_processes.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(flower_processes.os, "_exit", ended.append)
    flower_processes.start_clients("127.0.0.1:1", bytes(32))
    assert asked == [["flwr-clientapp"]] * 2
    words, token = started
    assert (token, ended) == (b"the token", [1])
    assert not any("the token" in word for word in words)


def test_flowers_client_of_the_gate_shows_the_sites_certificate(tmp_path, monkeypatch):
    """It gets a context that trusts the kit's authority alone; ours adds the certificate."""
    from flwr.supernode import fleet_http_connection as connection

    from fedfora.deployment.certificates import make_authority, make_client

    shown = []
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", lambda self, *files: shown.append(files))
    monkeypatch.setattr(connection, "FleetHttpClient", connection.FleetHttpClient)
    key, certificate = make_client("north")
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "crt").write_bytes(certificate)
    flower_processes._show_certificate(str(tmp_path / "crt"), str(tmp_path / "key"))
    authority = make_authority("clinics")[1]
    with connection.FleetHttpClient.from_server_address(
        "127.0.0.1:1", False, authority, interceptors=[]
    ):
        pass
    assert shown == [(str(tmp_path / "crt"), str(tmp_path / "key"))]
