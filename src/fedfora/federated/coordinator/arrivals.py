"""Who came, or came back as another node, since the last round, and may take part from now on."""

from collections.abc import Container
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from fedfora.federated.coordinator.handshake import Agreement, OnAbsent, newcomers
from fedfora.federated.coordinator.membership import Membership
from fedfora.federated.coordinator.strategy import SiteInfo

ASK_AGAIN_ROUNDS = 2  # a node that could not be taken in is asked again after so many
DEADLINE_S = 60.0  # the others wait no longer for one that comes late; its base goes on loading


@dataclass
class LateJoiners:
    """Asks strangers who they are.

    Args:
        grid: The engine.
        members: Who may take part; nobody comes late where their number is fixed.
        deadline_s: Longest time to wait for their answers, in seconds, up to `DEADLINE_S`.
        on_absent: Called with a site that may not join, or does not answer, and the reason.
    """

    grid: Grid
    members: Membership
    deadline_s: float | None
    on_absent: OnAbsent
    _asked_in: dict[int, int] = field(default_factory=dict)

    def before(
        self, round_number: int, known: Container[int], agreement: Agreement
    ) -> list[SiteInfo]:
        """Return the sites that join before a round.

        Args:
            round_number: Which.
            known: Nodes that take part already.
            agreement: What a site must agree to.
        """
        if not self.members.grows:
            return []
        since = round_number - ASK_AGAIN_ROUNDS
        strangers = [
            node
            for node in sorted(self.grid.get_node_ids())
            if node not in known and self._asked_in.get(node, since) <= since
        ]
        self._asked_in |= dict.fromkeys(strangers, round_number)
        return newcomers(
            self.grid,
            strangers,
            agreement,
            deadline_s=min(self.deadline_s or DEADLINE_S, DEADLINE_S),
            on_absent=self.on_absent,
            members=self.members,
        )
