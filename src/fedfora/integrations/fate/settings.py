"""The user's settings for a party of a FATE federation."""

from dataclasses import dataclass, fields

from fedfora.config import Options, flag
from fedfora.data.settings import DataArguments
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.reporting.record import RunArguments
from fedfora.training.settings import TrainArguments

ROLES = ("guest", "host", "arbiter")
AGGREGATOR = "secure_aggregate"  # FATE 2.2's "plaintext" returns the updates' sum for their mean

Party = tuple[str, str]  # role and id, as FATE names a party


@dataclass
class FateArguments(Options):
    """This party, the others, and the settings that all share."""

    role: str = flag(
        "",
        "this party's role: one guest, one or more hosts, one arbiter",
        choices=ROLES,
        often=True,
    )
    party_id: str | None = flag(
        None, "this party's id; only needed where a role has several", often=True
    )
    parties: list[str] = flag(
        ["guest:9999", "host:10000", "arbiter:10000"],
        "all parties as role:id, in the same order everywhere",
        often=True,
    )
    session_id: str = flag("fedfora", "name of the federation; a new one for every run")
    message_dir: str = flag(
        "out/fate", "where the parties leave messages for each other; all must see it", "--data_dir"
    )
    rabbitmq: str | None = flag(
        None,
        "a YAML file with the RabbitMQ broker that carries the messages (docs/fate.md); "
        "--message_dir is then this party's own",
    )
    num_rounds: int = flag(3, "rounds of training and aggregation", often=True, least=1)
    local_steps: int = flag(10, "optimizer steps of a party in a round", often=True, least=1)
    trainable: str = flag(
        "all",
        "what trains and travels: all five factors, or the core alone, whose mean is exact",
        choices=("core", "all"),
    )
    warmup_rounds: int = flag(
        0, "with --trainable core: the first N rounds train all factors, to find A and D", least=0
    )
    error_probes: int = flag(
        8,
        "random vectors that measure the aggregation error, with --trainable all; 0 for none",
        least=0,
    )
    timeout_s: float = flag(
        600.0, "longest wait for another party, its training included", within="(0, inf]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_rounds and self.trainable != "core":
            raise ValueError("--warmup_rounds needs --trainable core")
        if "/" in self.session_id or not self.session_id:
            raise ValueError(f"--session_id {self.session_id!r}: must be a name without slashes")

    def trained_in(self, round_index: int) -> str:
        """Return what trains in a round (counted from 0): "core" or "all"."""
        return "all" if round_index < self.warmup_rounds else self.trainable

    def all_parties(self) -> list[Party]:
        """Return all parties as role and id.

        Raises:
            ValueError: If a party is no role:id, or the roles are not one guest, one arbiter and
                at least one host.
        """
        parties = []
        for text in self.parties:
            role, _, party_id = text.partition(":")
            if role not in ROLES or not party_id:
                raise ValueError(
                    f"--parties {text}: expected ROLE:ID with a role of {', '.join(ROLES)}"
                )
            parties.append((role, party_id))
        if len(set(parties)) < len(parties):
            raise ValueError(f"--parties {' '.join(self.parties)}: a party is named twice")
        counts = {role: sum(r == role for r, _ in parties) for role in ROLES}
        if counts["guest"] != 1 or counts["arbiter"] != 1 or counts["host"] < 1:
            raise ValueError(
                "--parties: a FATE federation has one guest, one arbiter and some hosts, got "
                f"{' '.join(self.parties)}"
            )
        return parties

    def own_party(self) -> Party:
        """Return this party's role and id.

        Raises:
            ValueError: If there is no such party, or several with this role.
        """
        if not self.role:
            raise ValueError(f"--role is missing: one of {', '.join(ROLES)}")
        candidates = [
            party
            for party in self.all_parties()
            if party[0] == self.role and self.party_id in (None, party[1])
        ]
        if len(candidates) != 1:
            what = "needs --party_id" if candidates else f"--party_id {self.party_id}: not"
            raise ValueError(f"--role {self.role} {what} one of {' '.join(self.parties)}")
        return candidates[0]


@dataclass(frozen=True)
class FateSettings:
    """All settings of a party."""

    run: RunArguments
    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    train: TrainArguments
    fate: FateArguments

    def __post_init__(self) -> None:
        if self.train.max_steps > 0:
            raise ValueError(
                "--max_steps has no meaning here: a party takes --num_rounds x --local_steps steps"
            )


SECTIONS = {field.name: field.type for field in fields(FateSettings)}
