"""Messages out, replies in: in a stable order, within a deadline, one reply for every message.

The deadline counts the seconds in which nothing arrived, not those spent handling a reply.
The embedded engine lets a site work while its reply is pulled; it keeps each site's own time, by
the message's time to live, and says itself who was late.
"""

import logging
import time
from collections.abc import Iterable, Iterator

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedfora.registry import printable

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.1
EXPIRED = 3  # Flower's error code for a message that has outlived its time
NO_REPLY = 4  # Flower's error code for a reply that is not there


def receive(
    grid: Grid, messages: Iterable[Message], *, deadline_s: float | None = None
) -> Iterator[Message]:
    """Send messages and yield one reply for each, in their order, as soon as that allows.

    For a site that cannot be reached, or does not answer within `deadline_s` seconds (None waits
    forever), there is an error reply. Replies to anything but these messages are ignored.
    """
    messages = list(messages)
    pushed = set(grid.push_messages(messages))
    sent = {message.metadata.message_id: message for message in messages}
    pending = {message_id: None for message_id in sent if message_id in pushed}
    arrived: dict[str, Message] = {}
    left_s = float("inf") if deadline_s is None else deadline_s
    for message_id, message in sent.items():
        while message_id in pending and left_s > 0:
            started = time.monotonic()
            replies = _expected(grid.pull_messages(pending), pending)
            arrived |= replies
            if not replies:
                time.sleep(min(POLL_INTERVAL_S, left_s))
                left_s -= time.monotonic() - started
        reply = arrived.pop(message_id, None)
        if reply is not None and not reply.has_error():
            yield reply
            continue
        if reply is None:
            late = f"no answer within {deadline_s:g} s" if message_id in pending else "unreachable"
            error = Error(NO_REPLY, late)
        elif reply.error.code == EXPIRED:
            error = Error(NO_REPLY, f"no answer within {message.metadata.ttl:g} s")
        else:  # one that Flower made itself names the coordinator as its sender
            error = Error(reply.error.code, printable(reply.error.reason))
        yield Message(error, reply_to=message)


def _expected(replies: Iterable[Message], pending: dict[str, None]) -> dict[str, Message]:
    """Return the replies to pending messages by the message's id, and remove those."""
    expected = {}
    for reply in replies:
        message_id = reply.metadata.reply_to_message_id
        if message_id in pending:
            del pending[message_id]
            expected[message_id] = reply
        else:
            logger.warning("ignored a reply to a message that nobody waits for")
    return expected
