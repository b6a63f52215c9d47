"""One party of a FATE federation, from settings to the end of the federation.

Guest and hosts train and each keeps the result; the arbiter is FATE's own, unchanged: it has no
model and no result.
"""

import platform
import sys
from collections.abc import Callable
from typing import Any

from fedfora.data.sources import chosen_source
from fedfora.integrations.fate.connection import read_broker
from fedfora.integrations.fate.settings import FateSettings, Party
from fedfora.models.resolve import checked_model_name
from fedfora.registry import installed_version
from fedfora.reporting.record import check_output_dir
from fedfora.reporting.view import View

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


def check_party(settings: FateSettings) -> Party:
    """Return this party's role and id, once everything that needs no other party was checked.

    Raises:
        ValueError: Naming the flag, or what is missing to run FATE.
    """
    party = settings.fate.own_party()
    if party[0] != "arbiter":
        check_output_dir(settings.run.output_dir, overwrite=settings.run.overwrite_output_dir)
        chosen_source(settings.data.train_file, settings.data, flag="--train_file")
        checked_model_name(settings.model)
    if settings.fate.rabbitmq is not None:
        read_broker(settings.fate.rabbitmq)
    require_fate()
    return party


def run_party(
    settings: FateSettings, view: View, *, on_round: Callable[[Any], None] = lambda report: None
) -> None:
    """Take part in a federation until it is over.

    Args:
        settings: The party's.
        view: Where to show it.
        on_round: Called with the `RoundReport` of every round, at guest and hosts.

    Raises:
        ValueError: If the settings do not work, the parties disagree, or one of them is lost.
    """
    party = check_party(settings)
    from fedfora.integrations.fate.connection import join, leave_together
    from fedfora.integrations.fate.learner import Learner

    learner = None if party[0] == "arbiter" else Learner(settings, view, on_round)
    ctx, federation = join(settings.fate, party)
    try:
        if learner is None:
            from fate.ml.nn.homo.fedavg import FedAVGServer

            FedAVGServer(ctx).train()
        else:
            learner.learn(ctx, federation)
        leave_together(ctx)
    except BaseException as error:
        federation.say_last_word(error)
        raise


def require_fate() -> None:
    """Return if FATE's packages, none of which is imported yet, are here as they were tested.

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
    installed = {name: installed_version(name) for name in PACKAGES}
    wrong = [
        f"{name} {wanted or ''}".rstrip()
        + (f" (found {installed[name]})" if installed[name] else "")
        for name, wanted in PACKAGES.items()
        if installed[name] is None or wanted not in (None, installed[name])
    ]
    if wrong:
        raise ValueError(f"FATE is not installed, missing: {', '.join(wrong)}; {INSTALL}")
