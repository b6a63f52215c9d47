"""Guest, hosts and arbiter as real processes: equal weights, FedAvg's mean, and the guards."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from fedfora.adapter.state import fold
from fedfora.data.clinic import clinic_rows
from fedfora.federated.aggregation import RULES
from fedfora.integrations.fate.party import require_fate
from fedfora.models.resolve import model_path
from fedfora.models.saving import read_adapter
from rabbitmq_broker import SERVER, broker


def reason_to_skip():
    try:
        require_fate()
    except ValueError as error:
        return str(error)
    return ""


pytestmark = [
    pytest.mark.fate,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]

TRIO = ["guest:9999", "host:10000", "arbiter:10000"]
QUICK = {
    "model_name_or_path": "clinic-base",
    "trainable": "core",
    "num_rounds": 2,
    "local_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "timeout_s": 120,
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Rows of three clinics, of different numbers."""
    directory = tmp_path_factory.mktemp("rows")
    paths = {}
    for name, rows in (("a", slice(0, 30)), ("b", slice(700, 720)), ("c", slice(1300, 1310))):
        paths[name] = directory / f"{name}.json"
        paths[name].write_text("\n".join(json.dumps(row) for row in clinic_rows()[rows]))
    return paths


@pytest.fixture(scope="session")
def core_run(federate, files, tmp_path_factory):
    """A guest, two hosts and an arbiter on a 4-bit base, with the core alone trained."""
    directory = tmp_path_factory.mktemp("core") / "run"
    parties = ["guest:1", "host:2", "host:3", "arbiter:4"]
    own = {
        "guest:1": {"train_file": files["a"], "seed": 7},
        "host:2": {"train_file": files["b"], "seed": 8},  # the guest's seed counts
        "host:3": {"train_file": files["c"]},
    }
    ended = federate(directory, {**QUICK, "lora_rank": 8}, own, parties=parties)
    assert [(name, party.output) for name, party in ended.items() if party.status] == []
    return ended


CLIENTS = {"guest:1": 30, "host:2": 20, "host:3": 10}


@pytest.mark.parametrize("round_number", [1, 2])
def test_all_clients_hold_equal_weights_after_every_round(core_run, round_number):
    guest, *hosts = (core_run[name].state("averaged", round_number) for name in CLIENTS)
    for host in hosts:
        assert [name for name in guest if not torch.equal(guest[name], host[name])] == []


@pytest.mark.parametrize("round_number", [1, 2])
def test_the_mean_is_our_own_fedavg_of_what_the_parties_had(core_run, round_number):
    updates = [
        (core_run[name].state("sent", round_number), float(rows)) for name, rows in CLIENTS.items()
    ]
    expected = fedavg(updates)
    found = core_run["guest:1"].state("averaged", round_number)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
    cores = [name for name in expected if name.endswith(".E")]
    one, other = updates[0][0], updates[1][0]
    assert all(not torch.equal(one[name], other[name]) for name in cores)


def test_in_core_mode_the_mean_is_that_of_the_updates_themselves(core_run):
    parts = [(core_run[name].state("sent", 2), rows / 60) for name, rows in CLIENTS.items()]
    found = core_run["guest:1"].state("averaged", 2)
    for layer in layers(found):
        dense = sum(share * delta(update, layer) for update, share in parts)
        torch.testing.assert_close(delta(found, layer), dense, rtol=1e-5, atol=1e-7)


def test_they_learn_and_say_so(core_run):
    for name in CLIENTS:
        out = core_run[name].directory / "out"
        one, two = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        assert two["loss"] < one["loss"]
        assert two["aggregation_error"] is None
        cores = 4 * 7 * 8 * 8 + 1  # layers, linear maps, R x R, the loss
        assert 16 * cores < one["uplink_bytes"] < 20 * cores + 20_000
    environments = [
        json.loads((core_run[name].directory / "out" / "environment.json").read_text())
        for name in CLIENTS
    ]
    assert [e["seed"] for e in environments] == [7, 7, 7]
    assert not (core_run["arbiter:4"].directory / "out").exists()


def test_plain_peft_loads_what_was_saved(core_run):
    base = AutoModelForCausalLM.from_pretrained(model_path("clinic-base"))
    out = core_run["host:2"].directory / "out"
    PeftModel.from_pretrained(base, out)
    saved = fold(read_adapter(out))
    last = core_run["guest:1"].state("averaged", 2)
    assert saved.keys() == last.keys()
    assert all(torch.equal(saved[name], last[name]) for name in saved)


def test_nothing_is_left_of_the_messages_of_a_federation_that_ended_well(core_run):
    messages = core_run["guest:1"].directory.parent / "messages"
    assert sorted(path.suffix for path in messages.iterdir()) == [".joined"] * 4


@pytest.fixture(scope="session")
def warm_run(federate, files, tiny_dir, tmp_path_factory):
    """Two rounds of all factors, then one of the core alone, on a float32 base."""
    flags = {
        **QUICK,
        "model_name_or_path": tiny_dir,
        "quantization": "none",
        "warmup_rounds": 2,
        "num_rounds": 3,
        "lora_rank": 2,
        "error_probes": 64,
    }
    own = {"guest:9999": {"train_file": files["a"]}, "host:10000": {"train_file": files["c"]}}
    ended = federate(tmp_path_factory.mktemp("warm") / "run", flags, own, parties=TRIO)
    assert [(name, party.output) for name, party in ended.items() if party.status] == []
    return ended["guest:9999"], ended["host:10000"]


def test_the_mean_of_all_factors_is_our_own_fedavg_too(warm_run):
    guest, host = warm_run
    updates = [(guest.state("sent", 2), 30.0), (host.state("sent", 2), 10.0)]
    expected, found = fedavg(updates), guest.state("averaged", 2)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
    moved = {name.rpartition(".")[2] for name in found if not equal_in(updates, name)}
    assert moved == {"A", "D", "E"}


def test_the_recorded_aggregation_error_is_the_dense_one(warm_run):
    guest, host = warm_run
    updates = [(guest.state("sent", 2), 30.0), (host.state("sent", 2), 10.0)]
    found = guest.state("averaged", 2)
    missed = norm = 0.0
    for layer in layers(found):
        dense = sum(rows / 40 * delta(update, layer) for update, rows in updates)
        missed += float((delta(found, layer) - dense).square().sum())
        norm += float(dense.square().sum())
    lines = (guest.directory / "out" / "metrics.jsonl").read_text().splitlines()
    assert missed > 0
    measured = json.loads(lines[1])["aggregation_error"]
    assert measured == pytest.approx((missed / norm) ** 0.5, rel=0.3)


def test_after_the_warm_up_the_core_alone_moves_and_its_mean_is_exact(warm_run):
    guest, host = warm_run
    before = guest.state("averaged", 2)
    updates = [(guest.state("sent", 3), 30.0), (host.state("sent", 3), 10.0)]
    for name, value in before.items():
        assert all(torch.equal(u[name], value) for u, _ in updates) == (name[-1] != "E")
    found = guest.state("averaged", 3)
    for layer in layers(found):
        dense = sum(rows / 40 * delta(update, layer) for update, rows in updates)
        torch.testing.assert_close(delta(found, layer), dense, rtol=1e-5, atol=1e-8)
    first, _, last = map(
        json.loads, (guest.directory / "out" / "metrics.jsonl").read_text().splitlines()
    )
    assert last["aggregation_error"] is None
    assert last["uplink_bytes"] < first["uplink_bytes"] / 4


def test_a_killed_party_is_named_within_the_deadline(federate, files, tmp_path):
    own = {"guest:9999": {"train_file": files["a"]}, "host:10000": {"train_file": files["b"]}}
    flags = {**QUICK, "num_rounds": 3, "timeout_s": 45}
    ended = federate(
        tmp_path / "killed", flags, own, parties=TRIO, die_after_round={"host:10000": 1}
    )
    assert ended["host:10000"].status == 9
    for name in ("guest:9999", "arbiter:10000"):
        assert ended[name].status == 1
        (line,) = (li for li in ended[name].output.splitlines() if li.startswith("error:"))
        assert "host:10000 did not answer within 45 s" in line
        assert not (ended[name].directory / "out" / "adapter_model.safetensors").exists()


@pytest.mark.skipif(not SERVER.exists(), reason="needs Debian's rabbitmq-server")
def test_over_rabbitmq_each_party_keeps_to_its_own_directory(federate, files, tmp_path):
    """Real sockets, and large messages in pieces; a killed party is named here, too."""
    directory = tmp_path / "run"
    with broker(tmp_path / "broker") as address:
        (tmp_path / "broker.yaml").write_text(yaml.safe_dump(address))
        flags = {**QUICK, "rabbitmq": tmp_path / "broker.yaml", "trainable": "all"}
        own = {
            "guest:9999": {"train_file": files["a"], "message_dir": directory / "guests"},
            "host:10000": {"train_file": files["b"], "message_dir": directory / "hosts"},
            "arbiter:10000": {"message_dir": directory / "arbiters"},
        }
        ended = federate(directory, flags, own, parties=TRIO)
        assert [(name, party.output) for name, party in ended.items() if party.status] == []
        guest, host = ended["guest:9999"], ended["host:10000"]
        sent = [(guest.state("sent", 2), 30.0), (host.state("sent", 2), 20.0)]
        found, expected = guest.state("averaged", 2), fedavg(sent)
        assert all(torch.equal(found[name], host.state("averaged", 2)[name]) for name in found)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
        killed = federate(
            tmp_path / "killed",
            {**flags, "session_id": "killed", "num_rounds": 3, "timeout_s": 45},
            own,
            parties=TRIO,
            die_after_round={"host:10000": 1},
        )
        assert killed["host:10000"].status == 9
        for name in ("guest:9999", "arbiter:10000"):
            assert killed[name].status == 1
            assert "host:10000 did not answer within 45 s" in killed[name].output


def test_parties_that_mean_different_numbers_do_not_start(federate, files, tmp_path):
    own = {
        "guest:9999": {"train_file": files["a"]},
        "host:10000": {"train_file": files["b"], "lora_rank": 4},
    }
    ended = federate(tmp_path / "differ", {**QUICK, "timeout_s": 45}, own, parties=TRIO)
    for party in ended.values():
        assert party.status == 1
        assert "the parties differ in layout: the guest has" in party.output
        assert not (party.directory / "out").exists()


@pytest.mark.skipif(find_spec("sklearn") is None, reason="FATE's own runner needs scikit-learn")
def test_fate_llms_own_runner_trains_our_model_class(federate, files, tmp_path):
    """Its trainer averages the trainable tensors one by one: here E alone, from the same start."""
    own = {"guest:9999": {"train_file": files["a"]}, "host:10000": {"train_file": files["b"]}}
    ended = federate(tmp_path / "runner", QUICK, own, parties=TRIO, worker="runner_worker.py")
    assert [(name, party.output) for name, party in ended.items() if party.status] == []
    guest, host = (ended[name].directory / "dump" for name in ("guest:9999", "host:10000"))
    one, other = read_adapter(guest), read_adapter(host)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for layer in layers(one):
        assert not torch.equal(one[f"{layer}.E"], -torch.eye(8))  # what it started from
        assert not one[f"{layer}.B"].any()
    base = AutoModelForCausalLM.from_pretrained(model_path("clinic-base"))
    PeftModel.from_pretrained(base, guest)


def test_fate_llms_own_model_class_knows_fora(tiny_dir, tmp_path):
    code = (
        "import fedfora.integrations.fate.pellm\n"
        "from fate_llm.model_zoo.pellm.llama import LLaMa\n"
        f"model = LLaMa(pretrained_path={tiny_dir!r}, peft_type='ForaConfig',\n"
        "              peft_config={'task_type': 'CAUSAL_LM', 'r': 2})\n"
        f"model.save_trainable({str(tmp_path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "FORA"
    assert read_adapter(tmp_path)["model.layers.0.mlp.up_proj.D"].shape == (128, 2)


def fedavg(updates):
    return RULES["fedavg"].aggregate({}, updates, None)


def equal_in(updates, name):
    one, other = (update[name] for update, _ in updates)
    return torch.equal(one, other)


def layers(state):
    return [name.removesuffix(".A") for name in state if name.endswith(".A")]


def delta(state, layer):
    A, D, E = (state[f"{layer}.{factor}"].double() for factor in "ADE")
    return D @ (torch.eye(len(E)) + E) @ A
