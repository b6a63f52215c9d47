"""What a check found: one line, good or bad, and what to do about it."""

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass

from fedfora.deployment.flower_processes import LOOPBACK
from fedfora.registry import installed_version
from fedfora.reporting.record import PACKAGES, check_disk_space

SOON_DAYS = 30

# The oldest and the newest version, each, that were tried together: in one federation (Flower), or
# on one base with the same fingerprint (the others). docs/log.md says when.
TRIED_TOGETHER = {
    "torch": ("2.13", "2.13"),
    "transformers": ("5.20", "5.24"),
    "peft": ("0.21", "0.21"),
    "bitsandbytes": ("0.50", "0.50"),
    "flwr": ("1.41", "1.42"),
}

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
    """Say which versions differ from those that the kit was made with; none keeps a site away.

    What they might change shows elsewhere: the base in its fingerprint.
    """
    installed = {name: installed_version(name) for name in PACKAGES}
    message = ", ".join(f"{name} {number or 'missing'}" for name, number in installed.items())
    if installed["flwr"] is None:
        return CheckResult("versions", False, message, 'pip install "fedfora[federated,privacy]"')
    for name, number in made_with.items():
        own = installed.get(name) or "0"
        if _minor(own) != _minor(number):
            oldest, newest = map(_minor, TRIED_TOGETHER.get(name, ("0", "0")))
            tried = all(oldest <= _minor(each) <= newest for each in (own, number))
            message += f"; the federation has {name} {number}, differs: "
            message += "tried together" if tried else "not tried"
    return CheckResult("versions", True, message)


def check_disk(state: Path, needed_bytes: int) -> CheckResult:
    """Say whether what will be written fits."""

    def look() -> str:
        check_disk_space(state, needed_bytes, flag="")
        return f"room for {needed_bytes / 2**20:,.0f} MiB under {state}"

    return run_check("disk", look, "make room, or move the kit to a larger disk")


def proxy_to(host: str) -> str | None:
    """Return the proxy that the environment names for TLS connections to a host."""
    if host in LOOPBACK.split(",") or proxy_bypass(host):
        return None
    proxies = getproxies_environment()
    return proxies.get("https") or proxies.get("all")


def shown(proxy: str | None) -> str:
    """Return a proxy as a person may see it: without its password."""
    return f"the proxy {(proxy or '').rpartition('@')[2]} (https_proxy, no_proxy)"


def _minor(number: str) -> list[int]:
    """Return the first two numbers of a version."""
    return [int("".join(filter(str.isdigit, part)) or 0) for part in number.split(".")[:2]]
