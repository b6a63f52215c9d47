import pytest

from fedfora.protection import keys


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    """Whatever keys the machine that runs the tests has, they are not used."""
    for name in (keys.SIGNING, keys.TRUSTED, keys.ENCRYPTION, keys.ENCRYPTION_FILE):
        monkeypatch.delenv(name, raising=False)
