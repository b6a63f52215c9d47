"""fedfora check site --kit DIR, fedfora check federation --kit DIR: what is not yet right.

One line for each thing; what fails says what to do. The exit status is 2 where something fails.
"""

from collections.abc import Sequence

from fedfora.cli.console import silence_libraries
from fedfora.config import ConfigParser
from fedfora.deployment.settings import CheckKitArguments


def run_kit(kind: str, words: Sequence[str]) -> None:
    """Look at a kit, and print a line for each thing as soon as it is found.

    Raises:
        ValueError: If no kit is named, it is broken, or something would keep it from running.
    """
    parser = ConfigParser([CheckKitArguments], prog=f"fedfora check {kind}", description=__doc__)
    (arguments,) = parser.parse(words)
    if arguments.kit is None:
        raise ValueError(f"which one? fedfora check {kind} --kit DIR")
    silence_libraries()
    from fedfora.deployment.kit import read_coordinator_kit, read_site_kit

    if kind == "site":
        kit = read_site_kit(arguments.kit)
        print(f"site {kit.name} of {kit.federation}", flush=True)
        from fedfora.deployment.check_site import check_site

        findings = check_site(kit)
    else:
        coordinator = read_coordinator_kit(arguments.kit)
        print(f"coordinator of {coordinator.federation}", flush=True)
        from fedfora.deployment.check_federation import check_federation

        findings = check_federation(coordinator)
    seen = []
    for finding in findings:
        print(finding.line(), flush=True)
        seen.append(finding.ok)
    if failed := seen.count(False):
        raise ValueError(f"{failed} of {len(seen)} checks failed")
