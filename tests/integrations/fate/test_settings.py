"""What a user can get wrong about a party is named before anybody waits for it."""

import platform
import re
from pathlib import Path

import pytest

from fedfora.cli.main import main
from fedfora.config import ConfigParser
from fedfora.integrations.fate import party
from fedfora.integrations.fate.settings import SECTIONS, FateArguments, FateSettings

FATE = "fate --model_name_or_path clinic-base --train_file clinic --output_dir {d}/out "

BROKER = "{host: b, port: 5672, mng_port: 15672, base_user: u, base_password: p, mode: client}"


def parse(words):
    return FateSettings(*ConfigParser(SECTIONS.values()).parse(words.split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--role is missing: one of guest, host, arbiter"),
        ("--role gast", "did you mean 'guest'"),
        ("--role guest --aggregator plaintext", "unknown option --aggregator"),
        ("--role guest --num_rounds 0", "--num_rounds must be at least 1, got 0"),
        ("--role guest --warmup_rounds 2", "--warmup_rounds needs --trainable core"),
        ("--role guest --timeout_s 0", "--timeout_s must be above 0"),
        ("--role guest --max_steps 5", "--num_rounds x --local_steps"),
        ("--role guest --parties guest:1 host:2", "one guest, one arbiter and some hosts"),
        ("--role guest --parties guest:1 host:2 arbiter", "--parties arbiter: expected ROLE:ID"),
        ("--role guest --parties guest:1 host:2 host:2 arbiter:3", "a party is named twice"),
        ("--role host --parties guest:1 host:2 host:3 arbiter:4", "--role host needs --party_id"),
        ("--role host --party_id 7", "--party_id 7: not one of guest:9999 host:10000"),
        ("--role guest --session_id a/b", "--session_id 'a/b'"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words, message, tmp_path, capsys):
    assert main((FATE.format(d=tmp_path) + words).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().split("\n")) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "no such file"),
        ("- a list", "expected keys and values"),
        ("host: [", "broker.yaml is not valid YAML"),
        (BROKER.replace("port: 5672, ", ""), "port is missing"),
        (BROKER.replace("mode", "mood"), "unknown key 'mood'"),
        (
            BROKER.replace("5672", "eleven"),
            "port: expected a whole number from 1 to 65535, got 'eleven'",
        ),
        (BROKER.replace("client", "server"), "unknown mode 'server'"),
        (BROKER.replace("client", "replication"), "needs a route_table"),
    ],
)
def test_a_mistake_in_the_brokers_file_is_named(said, message, tmp_path):
    path = tmp_path / "broker.yaml"
    if said is not None:
        path.write_text(said)
    with pytest.raises(ValueError, match="--rabbitmq") as caught:
        party.read_broker(str(path))
    assert message in str(caught.value)


def test_the_brokers_file_is_what_fate_asks_for(tmp_path):
    path = tmp_path / "broker.yaml"
    path.write_text(BROKER)
    found = party.read_broker(str(path))
    assert (found["federation.rabbitmq.host"], found["federation.rabbitmq.port"]) == ("b", 5672)
    assert found["federation.rabbitmq"]["max_message_size"] == 1_048_576


def test_another_python_or_platform_is_refused_with_the_one_that_works(monkeypatch):
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "13", "1"))
    with pytest.raises(ValueError, match=r"needs Python 3\.11 on Linux x86-64 .* is Python 3\.13"):
        party.require_fate()
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "11", "7"))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="on linux aarch64"):
        party.require_fate()


def test_what_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "11", "7"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    versions = dict(party.PACKAGES)
    monkeypatch.setattr(party, "installed_version", versions.get)
    party.require_fate()
    versions |= {"fate-llm": None, "ruamel.yaml": "0.18.6"}
    with pytest.raises(ValueError, match=r"requirements-fate\.txt") as caught:
        party.require_fate()
    assert "missing: fate-llm 2.2.0, ruamel.yaml 0.16.0 (found 0.18.6);" in str(caught.value)


def test_the_requirements_file_is_what_the_guard_asks_for():
    text = (Path(__file__).parents[3] / "requirements-fate.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    asked = dict(re.fullmatch(r"([\w.-]+)(?:==|>=)(.+)", line).groups() for line in lines)
    assert party.PACKAGES.items() <= asked.items()


def test_own_party_needs_an_id_only_where_a_role_has_several():
    assert FateArguments(role="host").own_party() == ("host", "10000")
    several = ["guest:1", "host:2", "host:3", "arbiter:1"]
    assert FateArguments(role="host", parties=several, party_id="3").own_party() == ("host", "3")
