"""The settings of a run of a real federation, from its kit: nothing waits without an end."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedfora.config import Scalar
from fedfora.deployment.kit import CoordinatorKit
from fedfora.deployment.settings import settings_of
from fedfora.federated.settings import FederationSettings
from fedfora.federated.settings_scope import LOCAL_ONLY

ROUND_DEADLINE_S, START_DEADLINE_S = 3600.0, 600.0  # where the settings say nothing


def settings_for(
    kit: CoordinatorKit, output_dir: Path, shared: Mapping[str, Scalar] | None = None
) -> FederationSettings:
    """Return the settings of a run.

    Args:
        kit: The coordinator's.
        output_dir: Where the run goes.
        shared: The settings that travel to the sites, where somebody else started the run; of the
            kit's, only the coordinator's own hold then.
    """
    given: dict[str, Any] = kit.settings
    if shared is not None:
        given = {**{name: value for name, value in given.items() if name in LOCAL_ONLY}, **shared}
    settings = settings_of({**given, "output_dir": str(output_dir)})
    rounds = settings.rounds
    rounds = replace(
        rounds,
        round_deadline=rounds.round_deadline or ROUND_DEADLINE_S,
        start_deadline=rounds.start_deadline or START_DEADLINE_S,
        min_clients=max(rounds.min_clients, kit.quorum or 1),
    )
    return replace(settings, rounds=rounds)
