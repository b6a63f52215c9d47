"""What a check found: one line, good or bad, and what to do about it."""

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass

from fedfora.deployment.flower_processes import LOOPBACK
from fedfora.reporting.record import check_disk_space

SOON_DAYS = 30

OTHERS = 0o077  # every right of group and world


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at.

    Args:
        what: In one word.
        ok: Whether the site can take part as far as this goes.
        message: What was found.
        remedy: What to do where it is not good.
    """

    what: str
    ok: bool
    message: str
    remedy: str = ""

    def line(self) -> str:
        """Return it as a line of text."""
        line = f"{'ok  ' if self.ok else 'FAIL'} {self.what:12s} {self.message}"
        return line if self.ok else f"{line}: {self.remedy}"


def run_check(what: str, look: Callable[[], str], remedy: str) -> CheckResult:
    """Return what `look` says as good, or the `ValueError` that it raises as bad."""
    try:
        return CheckResult(what, True, look())
    except ValueError as error:
        return CheckResult(what, False, str(error), remedy)


def check_modes(directory: Path, private: Iterable[Path]) -> CheckResult:
    """Say whether only the owner can read what is private, and the owner is this account."""
    open_ones = [
        path.name for path in (directory, *private) if stat.S_IMODE(path.stat().st_mode) & OTHERS
    ]
    if open_ones:
        remedy = f"chmod 700 {directory}; chmod 600 {directory}/*.key"
        return CheckResult("files", False, f"others may read {', '.join(open_ones)}", remedy)
    strange = [path.name for path in private if path.stat().st_uid != os.geteuid()]
    if strange:
        remedy = "run as the account that owns the kit, or give it the kit with chown"
        return CheckResult(
            "files", False, f"{', '.join(strange)} belongs to another account", remedy
        )
    return CheckResult("files", True, "all there, private ones readable by you alone")


def check_versions(made_with: Mapping[str, str]) -> CheckResult:
    """Say whether Flower and fedfora are those that the kit was made with."""
    installed = {name: _version(name) for name in ("fedfora", "flwr")}
    message = ", ".join(f"{name} {number or 'missing'}" for name, number in installed.items())
    for name, number in made_with.items():
        if name in installed and (installed[name] or "").split(".")[:2] != number.split(".")[:2]:
            return CheckResult(
                "versions",
                False,
                f"{message}; the federation has {name} {number}",
                f"pip install {name}=={number}",
            )
    if installed["flwr"] is None:
        return CheckResult("versions", False, message, 'pip install "fedfora[federated,privacy]"')
    return CheckResult("versions", True, message)


def check_disk(state: Path, needed_bytes: int) -> CheckResult:
    """Say whether what will be written fits."""

    def look() -> str:
        try:
            check_disk_space(state, needed_bytes)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--output_dir ")) from error
        return f"room for {needed_bytes / 2**20:,.0f} MiB under {state}"

    return run_check("disk", look, "make room, or move the kit to a larger disk")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def proxy_to(host: str) -> str | None:
    """Return the proxy that the environment names for TLS connections to a host."""
    if host in LOOPBACK.split(",") or proxy_bypass(host):
        return None
    proxies = getproxies_environment()
    return proxies.get("https") or proxies.get("all")


def shown(proxy: str | None) -> str:
    """Return a proxy as a person may see it: without its password."""
    return f"the proxy {(proxy or '').rpartition('@')[2]} (https_proxy, no_proxy)"
