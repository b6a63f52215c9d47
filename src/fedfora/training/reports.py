"""Who else is told how a training goes: TensorBoard and its like, by name."""

from importlib.util import find_spec

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from fedfora.registry import unknown


def reports(names: list[str]) -> list[str]:
    """Return the integrations to report to.

    Args:
        names: Names as transformers knows them; "none" alone for nobody; "all" alone for all that
            are installed; "auto" alone for TensorBoard where it is installed.

    Raises:
        ValueError: If a name is unknown or its package is not installed.
    """
    available = get_available_reporting_integrations()
    if names == ["none"]:
        return []
    if names == ["all"]:
        return list(available)
    if names == ["auto"]:
        return ["tensorboard"] if find_spec("tensorboard") else []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ["auto", "none", "all", *INTEGRATION_TO_CALLBACK]
            raise ValueError(f"--report_to: {unknown('report', name, known)}")
        if name not in available:
            raise ValueError(f"--report_to {name}: its package is not installed (pip install)")
    return names
