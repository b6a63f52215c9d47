"""Encrypted files open with their key, under their name, unchanged; otherwise not at all."""

import base64
import hashlib
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfora.protection import keys
from fedfora.protection.sealing import (
    SUFFIX,
    load_tensors,
    read_bytes,
    remove,
    save_tensors,
    seal,
    unseal,
    write_bytes,
)

KEY = bytes(range(32))
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@given(st.binary(max_size=200), st.data())
def test_any_changed_bit_is_noticed(content, data):
    sealed = bytearray(seal(content, KEY, "x"))
    assert unseal(bytes(sealed), KEY, "x") == content
    at = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[at // 8] ^= 1 << at % 8
    with pytest.raises(ValueError, match="x "):
        unseal(bytes(sealed), KEY, "x")


def test_another_key_another_name_and_a_cut_file_do_not_open():
    sealed = seal(b"weights", KEY, "adapter")
    for content, key, name in (
        (sealed, bytes(32), "adapter"),
        (sealed, KEY, "state"),
        (sealed[:-1], KEY, "adapter"),
        (sealed[:10], KEY, "adapter"),
        (b"", KEY, "adapter"),
    ):
        with pytest.raises(ValueError, match=r"cannot be opened|not a sealed file"):
            unseal(content, key, name)


def test_the_same_content_never_looks_the_same_twice():
    assert seal(b"weights", KEY, "x") != seal(b"weights", KEY, "x")


def with_key(monkeypatch, key=KEY):
    monkeypatch.setenv(keys.ENCRYPTION, base64.b64encode(key).decode())


def test_tensors_return_to_the_bit_and_their_bytes_are_not_on_the_disk(tmp_path, monkeypatch):
    with_key(monkeypatch)
    place = save_tensors(tmp_path / "w.safetensors", TENSORS)
    assert place.name == "w.safetensors" + SUFFIX
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert TENSORS["a"].numpy().tobytes() not in place.read_bytes()
    loaded = load_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert loaded["b"].dtype == torch.bfloat16
    with_key(monkeypatch, os.urandom(32))
    with pytest.raises(ValueError, match="another key"):
        load_tensors(tmp_path / "w.safetensors")
    monkeypatch.delenv(keys.ENCRYPTION)
    with pytest.raises(ValueError, match="its key is missing"):
        load_tensors(tmp_path / "w.safetensors")


def test_no_plain_file_stays_behind_a_sealed_one(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    assert save_tensors(path, TENSORS) == path
    with_key(monkeypatch)
    save_tensors(path, TENSORS)
    assert not path.exists()
    path.write_bytes(b"somebody else's")
    with pytest.raises(ValueError, match="both plain and sealed"):
        load_tensors(path)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_file_of_which_the_signed_record_has_another_digest_or_none_is_not_read(
    tmp_path, monkeypatch, sealed
):
    if sealed:
        with_key(monkeypatch)
    path = tmp_path / "state.json"
    place = write_bytes(path, b"{}")
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    assert read_bytes(path, {place.name: digest}) == b"{}"
    for signed in ({}, {"adapter": digest}, {place.name: "0" * 64}):
        with pytest.raises(ValueError, match=f"{place.name} is not the file that was signed"):
            read_bytes(path, signed)


@pytest.mark.parametrize("sealed", [False, True])
def test_what_is_removed_is_gone_in_either_form(tmp_path, monkeypatch, sealed):
    if sealed:
        with_key(monkeypatch)
    save_tensors(tmp_path / "w.safetensors", TENSORS)
    remove(tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_of_tensors_is_named(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match="safetensors: not a readable safetensors file"):
        load_tensors(path)
