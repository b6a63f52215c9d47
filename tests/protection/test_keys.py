import base64
import shutil
import stat
import subprocess

import pytest

from fedfora.protection import keys


def test_secrets_are_for_their_owner_and_never_written_over(tmp_path, monkeypatch):
    signing, disk = tmp_path / "site.pem", tmp_path / "disk.key"
    identity = keys.make_signing_key(signing)
    keys.make_encryption_key(disk)
    for path in (signing, disk):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    public = keys.read_signing_key(signing).public_key().public_bytes_raw()
    assert keys.key_id(public) == identity
    monkeypatch.setenv(keys.TRUSTED, str(tmp_path / "site.pem.pub"))
    assert keys.trusted_keys() == {public}
    for make, path in ((keys.make_signing_key, signing), (keys.make_encryption_key, disk)):
        with pytest.raises(ValueError, match="never overwritten"):
            make(path)


def test_several_trusted_keys_lie_in_one_file(tmp_path, monkeypatch):
    for name in "ab":
        keys.make_signing_key(tmp_path / name)
    both = tmp_path / "trusted.pem"
    both.write_text((tmp_path / "a.pub").read_text() + (tmp_path / "b.pub").read_text())
    monkeypatch.setenv(keys.TRUSTED, str(both))
    assert len(keys.trusted_keys()) == 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_keys_are_read(tmp_path):
    path = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True)
    assert len(keys.read_signing_key(path).private_bytes_raw()) == 32


def test_the_encryption_key_comes_from_a_file_or_from_a_variable(tmp_path, monkeypatch):
    assert keys.encryption_key() is None
    path = tmp_path / "disk.key"
    keys.make_encryption_key(path)
    monkeypatch.setenv(keys.ENCRYPTION_FILE, str(path))
    from_file = keys.encryption_key()
    assert len(from_file) == 32
    monkeypatch.setenv(keys.ENCRYPTION, path.read_text())
    with pytest.raises(ValueError, match="both set"):
        keys.encryption_key()
    monkeypatch.delenv(keys.ENCRYPTION_FILE)
    assert keys.encryption_key() == from_file


@pytest.mark.parametrize("value", ["no base64!", base64.b64encode(bytes(16)).decode()])
def test_what_is_no_encryption_key_is_refused(value, monkeypatch):
    monkeypatch.setenv(keys.ENCRYPTION, value)
    with pytest.raises(ValueError, match=keys.ENCRYPTION) as caught:
        keys.encryption_key()
    assert value not in str(caught.value)  # a secret, even a wrong one, is not for logs


def test_what_is_no_signing_key_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "site.pem"
    with pytest.raises(ValueError, match="cannot be read"):
        keys.read_signing_key(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="not a PEM private key"):
        keys.read_signing_key(path)
    monkeypatch.setenv(keys.TRUSTED, str(path))
    with pytest.raises(ValueError, match="not a PEM public key"):
        keys.trusted_keys()
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    other = generate_private_key(SECP256R1())
    path.write_bytes(other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    with pytest.raises(ValueError, match="not an Ed25519 key"):
        keys.read_signing_key(path)
