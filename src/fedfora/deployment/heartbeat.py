"""Signs of life: the trainer gives one every other second, its daemon ends it where none comes.

An operation that lasts longer than its caller waits stops the signs. So a trainer that hangs, in an
operation or altogether, costs its site a round or two, not all that are left. Opening the base and
the rows has no limit: it would take as long again.
"""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedfora.files import write_atomically

TRAINER = "trainer-directory"  # in the node's configuration: where the trainer's socket lies

HEARTBEAT = "trainer.pulse"  # in the kit's state; when it was touched last is the sign
BEAT_S = 2.0
SILENCE_S = 60.0  # a machine that is very busy may keep a thread waiting for long


class Heartbeat:
    """The trainer's side.

    Args:
        path: The file that is touched; what it holds says what is being done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._until = math.inf

    def start(self) -> None:
        """Give signs, in a thread of their own, until this process ends."""
        self._note("waiting")
        threading.Thread(target=self._give_signs, name="pulse", daemon=True).start()

    @contextmanager
    def during(self, operation: str, limit_s: float) -> Iterator[None]:
        """Give no more signs where the block runs longer than its limit.

        Args:
            operation: What the block does.
            limit_s: In seconds.
        """
        self._note(f"{operation}, for {limit_s:g} s at most")
        self._until = time.monotonic() + limit_s
        try:
            yield
        finally:
            self._until = math.inf
            self._note("waiting")

    def _give_signs(self) -> None:
        while True:
            if time.monotonic() < self._until:
                with suppress(OSError):
                    os.utime(self.path)
            time.sleep(BEAT_S)

    def _note(self, doing: str) -> None:
        """Put the note in its place whole: a reader must never see an empty one."""
        with suppress(OSError):  # a full disk must not stop a training
            write_atomically(self.path, doing)


class HeartbeatMonitor:
    """The daemon's side.

    Args:
        path: The file that is touched.
        silence_s: Seconds without a sign after which the process hangs. This process's own clock
            counts, so a machine that slept does no harm.
    """

    def __init__(self, path: Path, silence_s: float = SILENCE_S) -> None:
        self.path = path
        self.silence_s = silence_s
        self._last_sign = 0
        self._seen_at = 0.0

    def begin(self) -> None:
        """Begin anew: a process has been started, and gives its first sign when it is ready."""
        self.path.unlink(missing_ok=True)

    def problem(self) -> str | None:
        """Return, once, in what way the process hangs; None while it gives signs."""
        try:
            sign, doing = self.path.stat().st_mtime_ns, self.path.read_text(encoding="utf-8")
        except OSError:
            return None
        now = time.monotonic()
        if sign != self._last_sign:
            self._last_sign, self._seen_at = sign, now
        if now - self._seen_at < self.silence_s:
            return None
        self.begin()
        return f"no sign of life for {self.silence_s:g} s ({doing})"
