"""FATE's federation with a deadline on every wait, and a last word for those who wait.

FATE waits for a message for ever: when a party dies, the others hang. This stands between FATE's
context and its federation and changes nothing but the waiting. Who gives up tells the others whom
it missed, so that they too can name the party that is gone and not the one that gave up.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

from fedfora.integrations.fate.settings import Party

logger = logging.getLogger(__name__)

LAST_WORD = "fedfora_last_word"
GRACE_S = 5.0  # parties time out one after the other; so long to hear the better reason


class PartyLost(ValueError):
    """Another party did not answer in time; the message names it, and what others said of it."""


class DeadlineFederation:
    """What `fate.arch.context.Context` takes as a federation.

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
        waiting = {
            tuple(party): _in_thread(self._federation.pull_bytes, name, tag, [party])
            for party in parties
        }
        return self._wait(name, waiting)

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
            names = ", ".join(map(_name, missing))
            fact = f"{names} did not answer within {self.timeout_s:g} s (--timeout_s)"
            logger.info("%s; waited for %s", fact, name)
            self._say(fact)  # before listening: the others listen for as long
            raise PartyLost("; ".join([fact, *self._last_words(missing)]))
        return [future.result()[0] for future in waiting.values()]

    def _last_words(self, missing: list[Any]) -> list[str]:
        pull = self._federation.pull_bytes
        asked = {tuple(p): _in_thread(pull, LAST_WORD, "end", [p]) for p in self._others()}
        wait([asked[party] for party in missing], timeout=GRACE_S)
        words = {_name(p): f.result()[0].decode() for p, f in asked.items() if f.done()}
        me = _name(self._federation.local_party)
        return [
            f"{name} ended: {word}"
            for name, word in words.items()
            if not word.startswith(me)  # who missed this party knows no more than it
        ]

    def _others(self) -> list[Any]:
        me = tuple(self._federation.local_party)
        return [party for party in self._federation.parties if tuple(party) != me]


def _name(party: Any) -> str:
    role, party_id = party
    return f"{role}:{party_id}"


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
