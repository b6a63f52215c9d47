"""The lock file: all that set-up installs, with hashes, within the ranges of the metadata."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Pinned without hash: one version is different files for CPUs and GPUs.
PINNED = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def pins():
    """Each package of the lock that this Python installs, with its version and its hashes."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    lines += [line for line in PINNED.splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        requirement = Requirement(line.split(" --hash")[0].strip())
        if requirement.marker is None or requirement.marker.evaluate():
            (pin,) = requirement.specifier
            hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}", line)
            found[canonicalize_name(requirement.name)] = (Version(pin.version), hashes)
    return found


def wanted(extra):
    """The requirements of an extra with those of the extras that it names, and the core's."""
    requirements = list(PROJECT["dependencies"]) if extra is None else []
    for text in PROJECT["optional-dependencies"].get(extra, []):
        requirement = Requirement(text)
        if requirement.name == "fedfora":
            for other in requirement.extras:
                requirements += wanted(other)
        else:
            requirements.append(text)
    return requirements


@pytest.mark.parametrize("text", sorted({*wanted(None), *wanted("dev")}))
def test_the_lock_satisfies_what_the_metadata_asks_for(text):
    requirement = Requirement(text)
    pin, _ = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin, prereleases=True)


def test_every_pin_but_pytorch_has_a_hash():
    assert [name for name, (_, hashes) in pins().items() if not hashes] == ["torch"]


def test_what_the_package_needs_ends_below_and_above():
    for text in {*wanted(None), *wanted("all"), *wanted("simulation")}:
        operators = {each.operator for each in Requirement(text).specifier}
        assert {">=", "<"} <= operators, f"{text} has no end"


def test_the_lock_names_no_address():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--index" not in text


def test_what_is_installed_is_what_is_locked():
    """The suite passes with the versions of the lock, or it says nothing of them."""
    other = {}
    for name, (pin, _) in pins().items():
        try:
            installed = Version(version(name).split("+")[0])
        except PackageNotFoundError:
            installed = None
        if installed != pin:
            other[name] = f"{installed}, locked {pin}"
    if other and default_environment()["platform_system"] != "Linux":
        pytest.skip("the lock is installed on Linux")
    assert not other
