"""The journal of a kit: one JSON line for each thing that left, came in, or went wrong.

At a site: what left. At the coordinator: what came from whom, who was let in or out, who started
what. Lines are only added. Each has a number and the SHA-256 of the line before it, so a line that
was changed, removed or moved is named; `journal.head` says which was the last one. An account that
may write both files can write another journal altogether: note the last digest elsewhere, or
compare a site's journal with the coordinator's, where the same answer has the same id and digest.

An alarm is a line, too. If the kit holds a program called `alarm`, it is started with the event's
name as its argument and the line as its input.
"""

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from fedfora.files import write_atomically
from fedfora.registry import printable

JOURNAL, HEAD, HOOK = "journal.jsonl", "journal.head", "alarm"
SENT, RECEIVED = "sent", "received"  # a site's answer, there and at the coordinator
RUN_NAME = "fedfora-run"  # in the run config: the name by which sites recognize the run
UNWRITTEN = "DISK"  # the only error of a site that may leave without a line in its journal
FIRST = "0" * 64
STATE = "FEDFORA_STATE"  # variable of a site's processes: where its journal is

Line = dict[str, Any]

logger = logging.getLogger(__name__)


def append(state: Path, event: str, **values: Any) -> Line:
    """Add a line, and return it once it is on the disk.

    Args:
        state: Directory of the kit's state.
        event: What happened, in one word.
        **values: What JSON can hold; None is left out.

    Raises:
        OSError: If it cannot be written; the journal is then as it was.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = {name: value for name, value in values.items() if value is not None}
    with _locked(state / JOURNAL) as file:
        number, previous = _end(file)
        with suppress(ValueError):  # lines that were cut off leave a gap
            number, previous = max(_head(state / HEAD), (number, previous), key=lambda end: end[0])
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"number": number + 1, "time": time, "event": event, **known, "previous": previous}
        text = json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n"
        before = file.seek(0, os.SEEK_END)
        try:
            file.write(text)
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise
        head = {"number": number + 1, "digest": _digest(text)}
        write_atomically(state / HEAD, json.dumps(head))
    return line


def alarm(state: Path, event: str, **values: Any) -> None:
    """Add a line that calls for a person, and start the kit's own program for it; never raise."""
    try:
        line = append(state, event, alarm=True, **values)
    except OSError:
        logger.exception("the alarm %s could not be recorded", event)
        line = {"event": event, "alarm": True, **values}
    hook = state.parent / HOOK
    if not os.access(hook, os.X_OK):
        return
    with tempfile.TemporaryFile() as told:
        told.write(json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n")
        told.seek(0)
        try:
            program = subprocess.Popen([str(hook), event], stdin=told, start_new_session=True)
            threading.Thread(target=program.wait, name="alarm", daemon=True).start()
        except OSError:
            logger.exception("%s could not be started", hook)


def read_journal(state: Path) -> list[Line]:
    """Return all lines, after checking that each follows the one before.

    Raises:
        ValueError: If there is no journal, or naming the line that was changed, cut or moved.
    """
    path = state / JOURNAL
    if not path.is_file():
        raise ValueError(f"{path}: no journal yet")
    texts = path.read_bytes().splitlines(keepends=True)
    lines, previous = [], FIRST
    for number, text in enumerate(texts, 1):
        try:
            line = dict(json.loads(text))
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: is incomplete, or was changed") from None
        if line.get("number") != number:
            raise ValueError(
                f"{path}, line {number}: is numbered {line.get('number')}; lines before it "
                "were removed or moved"
            )
        if line.get("previous") != previous:
            raise ValueError(f"{path}, line {number - 1}: was changed; line {number} disagrees")
        lines.append(line)
        previous = _digest(text)
    number, digest = _head(path.with_name(HEAD))  # lines after the one recorded were added since
    if number > len(texts):
        raise ValueError(f"{path}: ends with line {len(texts)}; lines up to {number} were cut off")
    if _digest(texts[number - 1]) != digest:
        raise ValueError(f"{path}, line {number}: was changed; {HEAD} disagrees")
    return lines


def rounds_answered(state: Path) -> int:
    """Return how many rounds of training a site has answered, in all runs together."""
    path = state / JOURNAL
    texts = path.read_bytes().splitlines() if path.is_file() else []
    lines = (json.loads(text) for text in texts if b'"operation": "train"' in text)
    return sum(line["event"] == SENT and "error" not in line for line in lines)


def last_digest(state: Path) -> str:
    """Return the digest of the last line, which stands for the whole journal."""
    with (state / JOURNAL).open("rb") as file:
        return _end(file)[1]


def disagreements(coordinators: list[Line], sites: list[Line]) -> list[str]:
    """Return what the coordinator's journal says of a site's answers and the site's own does not.

    An answer that came too late is only in the site's, and the error of a full disk only in the
    coordinator's: neither is a disagreement.

    Raises:
        ValueError: If the site's journal has no line that names the site.
    """
    site = next((line["site"] for line in sites if line["event"] == "started"), None)
    if site is None:
        raise ValueError(f"the site's {JOURNAL} does not say whose it is: no line 'started'")
    sent = {line["id"]: line for line in sites if line["event"] == SENT}
    found = []
    for line in coordinators:
        if line["event"] != RECEIVED or line.get("site") != site:
            continue
        own = sent.get(line["id"])
        if own is None and UNWRITTEN not in line.get("error", ""):
            found.append(f"line {line['number']}: {site} has not sent the answer to {line['id']}")
        elif own is not None and own.get("digest") != line.get("digest"):
            found.append(f"line {line['number']}: {site} sent a different answer to {line['id']}")
    return found


def shown(line: Line) -> str:
    """Return a line formatted for people."""
    hidden = ("number", "time", "event", "previous", "alarm")
    facts = "  ".join(f"{k}={v}" for k, v in line.items() if k not in hidden)
    mark = "ALARM " if line.get("alarm") else ""
    text = f"{line['number']:6d}  {line['time']}  {mark}{line['event']:12s}  {facts}"
    return printable(text, 10_000)  # the other side may have chosen a run's name


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if path.parent.stat().st_mode & 0o020:  # another account has the rows, and counts the rounds
        path.chmod(0o640)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _end(file: BinaryIO) -> tuple[int, str]:
    """Return number and digest of the last whole line; a lost writer's partial line is cut off."""
    size = at = file.seek(0, os.SEEK_END)
    tail = b""
    while at > 0 and tail.count(b"\n") < 2:
        start = max(0, at - 2**16)
        file.seek(start)
        tail, at = file.read(at - start) + tail, start
    whole = tail[: tail.rfind(b"\n") + 1]
    if file.writable() and len(whole) < len(tail):
        file.truncate(size - len(tail) + len(whole))
    if not whole:
        return 0, FIRST
    last = whole.splitlines(keepends=True)[-1]
    return int(json.loads(last)["number"]), _digest(last)


def _head(path: Path) -> tuple[int, str]:
    """Return number and digest of the line that was the last one when it was written."""
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        return int(head["number"]), str(head["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is missing, or was changed") from None


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
