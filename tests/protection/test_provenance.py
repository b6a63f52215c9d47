"""Signed directories: what was changed, taken, added or signed by somebody else is refused."""

import base64
import json
import shutil
from contextlib import nullcontext

import pytest

from fedfora.adapter.state import read_state
from fedfora.data.encoding import PromptFormat
from fedfora.exporting import lora
from fedfora.federated.coordinator import checkpoint
from fedfora.federated.coordinator.checkpoint import FederationState, publish_best
from fedfora.models import loading, resolve, saving
from fedfora.models.adapter_base import add_adapter
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.protection import keys
from fedfora.protection.provenance import NAME, sign_directory, verify_directory

FACTS = {"rounds": 3, "rule": "core", "epsilon": 2.5}


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """A signed adapter directory, whose signer is trusted."""
    identity = keys.make_signing_key(tmp_path / "owner.pem")
    monkeypatch.setenv(keys.SIGNING, str(tmp_path / "owner.pem"))
    monkeypatch.setenv(keys.TRUSTED, str(tmp_path / "owner.pem.pub"))
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    (directory / "adapter_config.json").write_text("{}")
    (directory / "README.md").write_text("a card, which anybody may improve")
    sign_directory(directory, FACTS)
    return directory, identity


def test_what_was_signed_is_accepted_with_its_facts(signed):
    directory, identity = signed
    (directory / "README.md").write_text("improved")
    found = verify_directory(directory)
    assert (found.signer, found.facts) == (identity, FACTS)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"weightz"), "not the file that"),
        (lambda d: (d / "adapter_config.json").write_text('{"r": 9}'), "not the file that"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "is missing"),
        (lambda d: (d / "fedfora.json").write_text("{}"), "not in the signed record"),
        (lambda d: (d / "adapter_model.safetensors.sealed").write_bytes(b"x"), "not in the signed"),
        (lambda d: (d / NAME).unlink(), "is not signed"),
        (lambda d: (d / NAME).write_text("{}"), "not a provenance record"),
        (lambda d: _edit(d, lambda c: c["statement"]["facts"].update(epsilon=0.1)), "signature"),
        (lambda d: _edit(d, lambda c: c.update(signature="AAAA")), "signature"),
        (lambda d: _edit(d, lambda c: c.update(public_key="AAAA")), "signature"),
    ],
)
def test_tampering_is_refused(signed, tamper, message):
    tamper(signed[0])
    with pytest.raises(ValueError, match=message):
        verify_directory(signed[0])


@pytest.mark.parametrize(
    "name",
    [
        *("adapter_config.json", "adapter_model.safetensors", "fedfora.json"),
        *("state.json", "state.safetensors"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".sealed"])
def test_no_file_that_is_loaded_is_added_behind_the_signature(signed, name, suffix):
    path = signed[0] / (name + suffix)
    if not path.exists():
        path.write_bytes(b"poison")
        with pytest.raises(ValueError, match="is not in the signed record"):
            verify_directory(signed[0])


LOADERS = {
    "weights": (saving, "adapter_model.safetensors", saving.read_adapter),
    "weights to be exported": (lora, "adapter_model.safetensors", lora._read_source),
    "configuration to be exported": (lora, "adapter_config.json", lora._read_source),
    "record": (resolve, "fedfora.json", resolve.read_record),
    "state": (checkpoint, "state.json", lambda path: checkpoint.load_checkpoint(path.parent)),
    "adapter": (checkpoint, "state.safetensors", lambda p: checkpoint.load_checkpoint(p.parent)),
    "weights to be used": (loading, "adapter_model.safetensors", lambda p: _on_base(p)),
    "configuration": (loading, "adapter_config.json", lambda path: _on_base(path)),
}


def _on_base(path):
    return loading.load_adapter(loading.load_base(ModelArguments("clinic-base", "none")), path)


@pytest.mark.parametrize("what", LOADERS)
def test_a_file_that_is_changed_after_the_check_is_not_used(signed, tmp_path, monkeypatch, what):
    """Verified by name and opened again by name, another one could be used than was signed."""
    module, name, load = LOADERS[what]
    base = loading.load_base(ModelArguments("clinic-base", "none"))
    model = add_adapter(base, AdapterArguments(lora_rank=2), seed=1)
    record = saving.adapter_record(PromptFormat("plain", "", 10, 10), "f" * 32)
    state, config = read_state(model), saving.adapter_config(model)
    path = checkpoint.save_checkpoint(
        tmp_path, FederationState(1, state), lambda p: saving.save_adapter(p, state, config, record)
    )
    check, other = module.signed_files, (path / name).read_bytes()
    other = other[:-1] + bytes([other[-1] ^ 1]) if "tensors" in name else other.replace(b"{", b"{ ")

    def slow(directory):
        found = check(directory)
        (path / name).write_bytes(other)
        return found

    load(path)
    monkeypatch.setattr(module, "signed_files", slow)
    with pytest.raises(ValueError, match=f"{name} is not the file that was signed"):
        load(path)


def test_what_is_changed_while_the_best_round_is_copied_gets_no_signature(
    signed, tmp_path, monkeypatch
):
    shutil.copytree(signed[0], tmp_path / "round-001")
    (tmp_path / "round-001" / "state.json").write_text("{}")
    sign_directory(tmp_path / "round-001", FACTS)
    check = checkpoint.signed_here

    def slow(directory):
        found = check(directory)
        (directory / "adapter_model.safetensors").write_bytes(b"poison")
        return found

    monkeypatch.setattr(checkpoint, "signed_here", slow)
    publish_best(tmp_path, 1)
    with pytest.raises(ValueError, match="is not the file that was signed"):
        verify_directory(tmp_path / "best")


def _edit(directory, change):
    content = json.loads((directory / NAME).read_text())
    change(content)
    (directory / NAME).write_text(json.dumps(content))


def test_who_changes_the_files_and_signs_anew_is_refused(signed, tmp_path, monkeypatch):
    directory, _ = signed
    thief = keys.make_signing_key(tmp_path / "thief.pem")
    monkeypatch.setenv(keys.SIGNING, str(tmp_path / "thief.pem"))
    (directory / "adapter_model.safetensors").write_bytes(b"poison")
    sign_directory(directory, FACTS)
    with pytest.raises(ValueError, match=f"signed by key {thief}"):
        verify_directory(directory)


@pytest.mark.parametrize("change", ["nothing", "weights", "facts", "no record", "signed anew"])
def test_a_round_that_was_changed_on_the_disk_gets_no_signature_as_the_best_one(
    signed, tmp_path, monkeypatch, change
):
    """`best` is signed once more, without the state: whatever lay there got the owner's name."""
    monkeypatch.delenv(keys.TRUSTED)  # this machine signs; who loads `best` elsewhere trusts it
    source = tmp_path / "round-001"
    shutil.copytree(signed[0], source)
    (source / "state.json").write_text("{}")
    sign_directory(source, FACTS)
    weights = source / "adapter_model.safetensors"
    if change in ("weights", "signed anew"):
        weights.write_bytes(b"poison")
    if change == "facts":
        _edit(source, lambda c: c["statement"]["facts"].update(epsilon=0.1))
    if change == "no record":
        (source / NAME).unlink()
    if change == "signed anew":
        keys.make_signing_key(tmp_path / "thief.pem")
        monkeypatch.setenv(keys.SIGNING, str(tmp_path / "thief.pem"))
        sign_directory(source, FACTS)
        monkeypatch.setenv(keys.SIGNING, str(tmp_path / "owner.pem"))
    refused = pytest.raises(ValueError, match=r"not the file that|the signature does")
    with refused if change in ("weights", "facts") else nullcontext():
        publish_best(tmp_path, 1)
    monkeypatch.setenv(keys.TRUSTED, str(tmp_path / "owner.pem.pub"))
    if change == "nothing":
        assert verify_directory(tmp_path / "best").facts == FACTS
        assert not list((tmp_path / "best").glob("state.*"))
    elif change in ("no record", "signed anew"):
        with pytest.raises(ValueError, match="best is not signed"):
            verify_directory(tmp_path / "best")
    else:
        assert not (tmp_path / "best").exists()


def test_a_record_does_not_fit_another_directory(signed, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(signed[0], other)
    (other / "adapter_model.safetensors").write_bytes(b"an older adapter")
    with pytest.raises(ValueError, match="not the file that was signed"):
        verify_directory(other)


def test_a_signature_for_another_purpose_does_not_count(signed, tmp_path):
    """The same key signing the same bytes without this record's domain."""
    directory, _ = signed
    key = keys.read_signing_key(tmp_path / "owner.pem")
    content = json.loads((directory / NAME).read_text())
    text = json.dumps(content["statement"], sort_keys=True, separators=(",", ":"))
    content["signature"] = base64.b64encode(key.sign(text.encode())).decode()
    (directory / NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="signature"):
        verify_directory(directory)


def test_without_trusted_keys_accidents_are_still_found(signed, monkeypatch):
    directory, _ = signed
    monkeypatch.delenv(keys.TRUSTED)
    (directory / "adapter_model.safetensors").write_bytes(b"half a dow")
    with pytest.raises(ValueError, match="not the file that was signed"):
        verify_directory(directory)


def test_a_machine_without_keys_neither_signs_nor_asks(signed, monkeypatch):
    directory, _ = signed
    monkeypatch.delenv(keys.SIGNING)
    monkeypatch.delenv(keys.TRUSTED)
    (directory / "adapter_model.safetensors").write_bytes(b"written again")
    sign_directory(directory, FACTS)
    assert not (directory / NAME).exists()
    assert verify_directory(directory) is None
