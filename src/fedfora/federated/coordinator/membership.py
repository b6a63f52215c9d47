"""Who may take part: in a simulation everybody; in a real federation whoever is registered."""


class Membership:
    """Whoever knows the members of a federation; this one takes everybody, and nobody comes late.

    Args:
        grows: Whether sites may join while the run is on.
    """

    grows = False

    def objection(self, node_id: int, index: int, name: str) -> str | None:
        """Return why a node may not be the site that it says it is; None where it may."""
        return None
