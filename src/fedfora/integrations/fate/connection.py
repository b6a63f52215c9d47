"""How a party enters a FATE federation, on a shared directory or a broker, and how all leave it."""

from pathlib import Path
from typing import Any

from fate.arch.context import Context, create_context
from fate.arch.federation import FederationEngine

from fedfora.integrations.fate.broker import open_vhosts, read_broker
from fedfora.integrations.fate.deadline import DeadlineFederation
from fedfora.integrations.fate.settings import FateArguments, Party


def join(fate: FateArguments, party: Party) -> tuple[Any, DeadlineFederation]:
    """Return FATE's context for a party, with a deadline on every wait.

    Raises:
        ValueError: If the party already took part in a session of this name.
    """
    directory = Path(fate.message_dir).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        (directory / f"{fate.session_id}.{'-'.join(party)}.joined").touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(
            f"--session_id {fate.session_id}: {party[0]}:{party[1]} took part in it before, its "
            f"messages lie in {directory}; every run needs a new name"
        ) from None
    engine, conf = FederationEngine.STANDALONE, None
    if fate.rabbitmq is not None:
        engine, conf = FederationEngine.RABBITMQ, read_broker(fate.rabbitmq)
    ctx = create_context(
        local_party=party,
        parties=fate.all_parties(),
        federation_session_id=fate.session_id,
        federation_engine=engine,
        federation_conf=conf,
        computing_conf={"computing.standalone.data_dir": str(directory)},
    )
    if fate.rabbitmq is None:
        _open_mailboxes(ctx.federation, party, fate.all_parties())
    else:
        open_vhosts(ctx.federation, party, fate.all_parties(), timeout_s=fate.timeout_s)
    federation = DeadlineFederation(ctx.federation, timeout_s=fate.timeout_s)
    return Context(computing=ctx.computing, federation=federation), federation


def _open_mailboxes(federation: Any, party: Party, parties: list[Party]) -> None:
    """Write to every party's mailbox, and read from the own, before there are threads.

    FATE opens a mailbox, an LMDB environment, when it is first used. A process must not open one
    twice; two threads that wait for their first messages would, and LMDB crashes.
    """
    federation.push_bytes(b"", "fedfora_opened", "start", parties)
    federation.pull_bytes("fedfora_opened", "start", [party])


def leave_together(ctx: Any) -> None:
    """Let the guest clear the messages away, once nobody waits for one any more."""
    if not ctx.is_on_guest:
        ctx.guest.put("fedfora_done", True)
        return
    for other in [*ctx.hosts, ctx.arbiter]:
        other.get("fedfora_done")
    ctx.destroy()
