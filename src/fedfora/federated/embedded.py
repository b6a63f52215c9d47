"""Engine `embedded`: a whole federation in one process, with one base model for all sites.

A Flower Grid that calls the ClientApp itself. A site runs when its reply is pulled, so the
coordinator holds one reply at a time.
"""

import logging
from collections.abc import Iterable, Mapping
from itertools import count
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfora.config import Scalar

logger = logging.getLogger(__name__)

RUN_ID = 1
SERVER_NODE_ID = 1
FIRST_NODE_ID = 100
CLIENT_APP_RAISED = 2  # Flower's error code for an exception in a ClientApp


class EmbeddedGrid(Grid):  # type: ignore[misc]  # a Flower interface
    """Carries messages between apps in this process."""

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: list[dict[str, Scalar]],
        run_config: Mapping[str, Scalar],
    ) -> None:
        _introduce_this_process()
        self._app = client_app
        self._message_ids = count(1)
        self._waiting: dict[str, Message] = {}
        self._run: Any = SimpleNamespace(run_id=RUN_ID)
        self._contexts = {
            FIRST_NODE_ID + i: Context(
                run_id=RUN_ID,
                node_id=FIRST_NODE_ID + i,
                node_config=node_config,
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i, node_config in enumerate(node_configs)
        }

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all sites."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages; each site works when its reply is pulled."""
        pushed = []
        for message in messages:
            message_id = str(next(self._message_ids))
            self._waiting[message_id] = _with_id(message, message_id)
            pushed.append(message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the first of these sites that has not worked yet do so, and return its reply."""
        for message_id in message_ids:
            if message_id in self._waiting:
                return [self._deliver(self._waiting.pop(message_id))]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return all replies."""
        return [self.pull_messages([i])[0] for i in self.push_messages(messages)]

    def _deliver(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._app(message, context)
        except Exception as error:  # as Flower's own runtimes do: a site's fault is a reply
            logger.error("a site failed", exc_info=error)
            return Message(
                Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message
            )


def run_embedded(
    server_app: ServerApp,
    client_app: ClientApp,
    node_configs: list[dict[str, Scalar]],
    run_config: Mapping[str, Scalar],
) -> None:
    """Run a federation of `len(node_configs)` sites to its end in this process."""
    grid = EmbeddedGrid(client_app, node_configs, run_config)
    context = Context(
        run_id=RUN_ID,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    server_app(grid, context)


def _with_id(message: Message, message_id: str) -> Message:
    """Return a copy with containers of its own: strategies share content between messages."""
    content = RecordDict(
        {key: type(record)(dict(record)) for key, record in message.content.items()}
    )
    copy = Message(
        content,
        message.metadata.dst_node_id,
        message.metadata.message_type,
        group_id=message.metadata.group_id,
    )
    copy.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids set it
    return copy


def _introduce_this_process() -> None:
    """Tell Flower who sends messages here; from 1.37 on it asks before it makes one."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 1
