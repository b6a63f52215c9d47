"""Whether FATE can run here, before anything of it is imported."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

INSTALL = "pip install --no-deps -r requirements-fate.txt"

# With these versions FATE was tested; None is any version.
PACKAGES = {
    "pyfate": "2.2.0",
    "fate-llm": "2.2.0",
    "fate-utils": "0.1.0",
    "lmdb": None,
    "mmh3": None,
    "omegaconf": None,
    "opentelemetry-api": None,
    "opentelemetry-sdk": None,
    "pika": None,  # speaks to RabbitMQ
    "ruamel.yaml": "0.16.0",  # FATE calls safe_load, which later ones have dropped
}


def require_fate() -> None:
    """Return if FATE's packages are here in the versions that were tested.

    Raises:
        ValueError: Naming the Python, the platform or the packages at fault, and the remedy.
    """
    python, machine = platform.python_version_tuple()[:2], platform.machine()
    if python != ("3", "11") or sys.platform != "linux" or machine != "x86_64":
        raise ValueError(
            "FATE needs Python 3.11 on Linux x86-64 (fate-utils 0.1.0 exists for no newer Python, "
            f"fedfora for no older one); this is Python {'.'.join(python)} on {sys.platform} "
            f"{machine}"
        )
    found = {name: _version(name) for name in PACKAGES}
    wrong = [
        f"{name} {wanted or ''}".rstrip() + (f" (found {found[name]})" if found[name] else "")
        for name, wanted in PACKAGES.items()
        if found[name] is None or wanted not in (None, found[name])
    ]
    if wrong:
        raise ValueError(f"FATE is not installed, missing: {', '.join(wrong)}; {INSTALL}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
