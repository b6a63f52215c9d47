"""Engine `embedded`: a whole federation in one process, with one base model for all sites.

A Flower Grid that calls the ClientApp itself. A site works when its reply is pulled, so the
coordinator holds one reply at a time.

Sites work one after the other here, so each has a clock of its own: a message's time to live counts
from when its site begins. An error stands in for a site that is late. If this runs in the main
thread of a Unix process, a timer stops the late site, even a sleeping or looping one; elsewhere
(and while a single call into compiled code lasts) the site may finish, and its reply is thrown
away. Only an engine with processes survives a call into compiled code that never comes back.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedfora.config import Scalar

logger = logging.getLogger(__name__)

RUN_ID = 1
SERVER_NODE_ID = 1
FIRST_NODE_ID = 100
CLIENT_APP_RAISED = 2  # Flower's error code for an exception in a ClientApp
NO_REPLY = 4  # and for a reply that is missing
ALARM_INTERVAL_S = 1.0  # the timer rings again if the first ring was swallowed
UNLIMITED_S = 43_200  # Flower's time to live for a message that was given none


class EmbeddedGrid:
    """Carries messages between apps in this process: what a coordinator needs of Flower's Grid."""

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: list[dict[str, Scalar]],
        run_config: Mapping[str, Scalar],
    ) -> None:
        introduce_this_process()
        self._app = client_app
        self._message_ids = count(1)
        self._waiting: dict[str, Message] = {}
        shared = dict(run_config)
        self._contexts = {
            FIRST_NODE_ID + i: Context(
                run_id=RUN_ID,
                node_id=FIRST_NODE_ID + i,
                node_config=node_config,
                state=RecordDict(),
                run_config=shared,
            )
            for i, node_config in enumerate(node_configs)
        }

    def get_node_ids(self) -> list[int]:
        """Return the ids of all sites."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages; each site works when its reply is pulled."""
        pushed = []
        for message in messages:
            message_id = str(next(self._message_ids))
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do
            self._waiting[message_id] = message
            pushed.append(message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the first of these sites that has not worked yet work, and return its reply."""
        for message_id in message_ids:
            if message_id in self._waiting:
                return [self._deliver(self._waiting.pop(message_id))]
        return []

    def _deliver(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        ttl = message.metadata.ttl
        limit_s = float("inf") if ttl == UNLIMITED_S else ttl
        started = time.monotonic()
        try:
            with _alarm(limit_s):
                reply = self._app(message, context)
        except _Late:
            reply = None
        except Exception as error:  # as Flower's own runtimes do: a site's fault is a reply
            logger.error("a site failed", exc_info=error)
            reply = Message(
                Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message
            )
        if reply is None or time.monotonic() - started > limit_s:
            reply = Message(Error(NO_REPLY, f"no answer within {limit_s:g} s"), reply_to=message)
        return reply


def run_embedded(
    server_app: ServerApp, client_app: ClientApp, num_sites: int, run_config: Mapping[str, Scalar]
) -> None:
    """Run a federation to its end in this process."""
    node_configs: list[dict[str, Scalar]] = [
        {"partition-id": i, "num-partitions": num_sites} for i in range(num_sites)
    ]
    grid = EmbeddedGrid(client_app, node_configs, run_config)
    context = Context(
        run_id=RUN_ID,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    server_app(grid, context)


class _Late(BaseException):
    """A site's time is up. Not an Exception, so that no library in between catches it as one."""


@contextmanager
def _alarm(limit_s: float) -> Iterator[None]:
    """Raise `_Late` in the block when it takes too long, where a timer can do so."""
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or limit_s == float("inf"):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s, ALARM_INTERVAL_S)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # again, as the first ring may come just before the timer is stopped above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def introduce_this_process() -> None:
    """Tell Flower who sends messages here: it asks before it makes one."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 1
