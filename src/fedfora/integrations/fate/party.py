"""One party of a FATE federation: enters, over a shared directory or a broker, works and leaves.

Guest and hosts train and each keeps the result; the arbiter is FATE's own, unchanged: it has no
model and no result. docs/fate.md shows a file with a broker.
"""

import logging
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any

from fedfora.data.sources import chosen_source
from fedfora.deployment.yaml_source import YamlSource
from fedfora.integrations.fate.settings import FateArguments, FateSettings, Party
from fedfora.models.resolve import checked_model_name
from fedfora.registry import installed_version, unknown
from fedfora.reporting.record import check_output_dir
from fedfora.reporting.view import View

logger = logging.getLogger(__name__)

INSTALL = "pip install --no-deps -r requirements-fate.txt"

# With these versions FATE was tested; the file above names what else it needs, in any version.
PACKAGES = {"pyfate": "2.2.0", "fate-llm": "2.2.0", "fate-utils": "0.1.0", "ruamel.yaml": "0.16.0"}

LAST_WORD = "fedfora_last_word"
GRACE_S = 5.0  # parties time out one after the other; how long to wait for the better reason
MODES = ("client", "replication")  # of a broker: all parties at one, or one each
REQUIRED = ("host", "port", "mng_port", "base_user", "base_password")
OPTIONAL: dict[str, Any] = {
    "mode": "client",
    "route_table": {},  # with replication: the others' brokers by party
    "max_message_size": 1_048_576,  # bytes; FATE cuts what is longer
    "rabbitmq_run": {},
    "connection": {},
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
    wrong = [
        f"{name} {wanted}" + (f" (found {installed})" if installed else "")
        for name, wanted in PACKAGES.items()
        if (installed := installed_version(name)) != wanted
    ]
    if wrong:
        raise ValueError(f"FATE is not installed, missing: {', '.join(wrong)}; {INSTALL}")


class PartyLost(ValueError):
    """Another party did not answer in time; the message names it, and what others said of it."""


class DeadlineFederation:
    """What `fate.arch.context.Context` takes as a federation, with a deadline on every wait.

    FATE waits for a message forever: when a party dies, the others hang. This stands between
    FATE's context and its federation and changes nothing but the waiting. Who gives up tells the
    others whom it missed, so that they too can name the party that is gone and not the one that
    gave up.

    Args:
        federation: FATE's own.
        timeout_s: Longest wait for a message, in seconds.
    """

    def __init__(self, federation: Any, *, timeout_s: float) -> None:
        self._federation = federation
        self.timeout_s = timeout_s
        self.bytes_sent = 0

    def __getattr__(self, name: str) -> Any:
        """Everything else is FATE's."""
        return getattr(self._federation, name)

    def push_table(self, table: Any, name: str, tag: str, parties: list[Party]) -> None:
        """Send a large message, which FATE cuts into the rows of a table, and count its bytes."""
        self.bytes_sent += sum(len(row) for _, row in table.collect()) * len(parties)
        self._federation.push_table(table, name, tag, parties)

    def push_bytes(self, v: bytes, name: str, tag: str, parties: list[Party]) -> None:
        """Send a message, and count its bytes."""
        self.bytes_sent += len(v) * len(parties)
        self._federation.push_bytes(v, name, tag, parties)

    def pull_bytes(self, name: str, tag: str, parties: list[Party]) -> list[bytes]:
        """Wait for a message from each party.

        Raises:
            PartyLost: If one does not come in time.
        """
        pull = self._federation.pull_bytes
        return self._wait(name, {tuple(p): _in_thread(pull, name, tag, [p]) for p in parties})

    def pull_table(
        self, name: str, tag: str, parties: list[Party], table_metas: list[Any] | None = None
    ) -> list[Any]:
        """Wait for a large message from each party; its header came before.

        Raises:
            PartyLost: If one does not come in time.
        """
        metas = table_metas or [None] * len(parties)
        waiting = {
            tuple(party): _in_thread(self._federation.pull_table, name, tag, [party], [meta])
            for party, meta in zip(parties, metas, strict=True)
        }
        return self._wait(name, waiting)

    def say_last_word(self, error: BaseException) -> None:
        """Leave every other party the reason why this one ends."""
        if not isinstance(error, PartyLost):  # a lost party was spoken of already
            self._say(str(error) or type(error).__name__)

    def _say(self, reason: str) -> None:
        try:
            self._federation.push_bytes(reason.encode(), LAST_WORD, "end", self._others())
        except Exception as error:  # the message that matters is the one that is raised already
            logger.warning("could not tell the other parties: %s", error)

    def _wait(self, name: str, waiting: "dict[Any, Future[Any]]") -> list[Any]:
        wait(waiting.values(), timeout=self.timeout_s)
        missing = [party for party, future in waiting.items() if not future.done()]
        if missing:
            names = ", ".join(map(":".join, missing))
            fact = f"{names} did not answer within {self.timeout_s:g} s (--timeout_s)"
            logger.info("%s; waited for %s", fact, name)
            self._say(fact)  # before listening: the others listen for as long
            raise PartyLost("; ".join([fact, *self._last_words(missing)]))
        return [future.result()[0] for future in waiting.values()]

    def _last_words(self, missing: list[Any]) -> list[str]:
        pull = self._federation.pull_bytes
        asked = {tuple(p): _in_thread(pull, LAST_WORD, "end", [p]) for p in self._others()}
        wait([asked[party] for party in missing], timeout=GRACE_S)
        words = {":".join(p): f.result()[0].decode() for p, f in asked.items() if f.done()}
        me = ":".join(self._federation.local_party)
        return [
            f"{name} ended: {word}"
            for name, word in words.items()
            if not word.startswith(me)  # one that missed this party knows nothing more
        ]

    def _others(self) -> list[Any]:
        me = tuple(self._federation.local_party)
        return [party for party in self._federation.parties if tuple(party) != me]


def _in_thread(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Run a call that may never return; its thread does not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def join(fate: FateArguments, party: Party) -> tuple[Any, DeadlineFederation]:
    """Return FATE's context for a party, with a deadline on every wait.

    Raises:
        ValueError: If the party already took part in a session of this name.
    """
    from fate.arch.context import Context, create_context
    from fate.arch.federation import FederationEngine

    directory = Path(fate.message_dir).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        (directory / f"{fate.session_id}.{'-'.join(party)}.joined").touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(
            f"--session_id {fate.session_id}: {party[0]}:{party[1]} already took part in it, its "
            f"messages are in {directory}; every run needs a new name"
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
        _open_vhosts(ctx.federation, party, fate.all_parties(), timeout_s=fate.timeout_s)
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


def read_broker(path: str) -> dict[str, Any]:
    """Return FATE's `federation_conf` for the broker that a file describes.

    Raises:
        ValueError: Naming file, line and key.
    """
    if not Path(path).is_file():
        raise ValueError(f"--rabbitmq {path}: no such file")
    try:
        document = YamlSource(Path(path))
        document.check_keys((), needed=REQUIRED, allowed=OPTIONAL)
        for key in ("port", "mng_port"):
            document.integer((key,), 1, 65_535)
        options = OPTIONAL | document.content
        if options["mode"] not in MODES:
            raise document.error(("mode",), unknown("mode", str(options["mode"]), MODES))
        if options["mode"] == "replication" and not options["route_table"]:
            raise document.error(("mode",), "replication needs a route_table")
    except ValueError as error:
        raise ValueError(f"--rabbitmq {error}") from error
    prefix = "federation.rabbitmq"
    return {prefix: options, f"{prefix}.host": options["host"], f"{prefix}.port": options["port"]}


def _open_vhosts(federation: Any, party: Party, parties: list[Party], *, timeout_s: float) -> None:
    """Make the virtual hosts of a party and wait until queues can be made in them.

    FATE makes them when the first message comes by and does not look whether it could: right after
    another party has made the same one the broker refuses queues in it for a moment.
    """
    from fate.arch.federation.message_queue import Party as FateParty

    manager = federation._rabbit_manager
    for role, party_id in parties:
        if (role, party_id) == party:
            continue
        vhost = federation._get_vhost(FateParty(role, party_id))
        manager.create_vhost(vhost)
        manager.add_user_to_vhost(federation.session_id, vhost)
        give_up = time.monotonic() + timeout_s
        while not manager.create_queue(vhost, "fedfora-opened"):
            if time.monotonic() > give_up:
                raise ValueError(
                    f"--rabbitmq: the broker at {manager.endpoint} makes no queue in {vhost}: are "
                    "base_user and base_password an administrator's there?"
                )
            time.sleep(0.2)
