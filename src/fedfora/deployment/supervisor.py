"""Keeps processes running: starts them, restarts what ends or hangs, leaves nothing behind.

A process that ends is restarted after a pause that doubles each time, and is short again once it
has lasted. Each process leads a group of its own, which is stopped as a whole; should the
supervisor itself be killed, the kernel tells its processes to end (Linux), and Flower's end with
the process that started them.

A site's trainer gives a sign of life every other second, unless an operation lasts longer than its
caller waits; its supervisor ends it where none comes. So a trainer that hangs, in an operation or
altogether, costs its site a round or two, not all that are left. Opening the base and the rows has
no limit: it would take as long again.
"""

import contextlib
import ctypes
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
LASTED_S = 120.0  # a process that lasts this long has started well
STOPPING_S = 8.0
MAX_LOG_BYTES = 20 << 20

TRAINER = "trainer-directory"  # in the node's configuration: where the trainer's socket is
HEARTBEAT = "trainer.pulse"  # in the kit's state; the sign is when it was last touched
BEAT_S = 2.0
SILENCE_S = 60.0  # a machine that is very busy may keep a thread waiting for long

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Child:
    """A process to keep running.

    Args:
        name: What it is called in messages.
        command: Returns its words; called again before every start.
        log: File that its output is added to.
        environment: Variables in addition to those of this process.
        after_start: Called after every start.
        trouble: Returns, once, how it hangs, and it is ended then; None while it does not hang.
    """

    name: str
    command: Callable[[], list[str]]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    after_start: Callable[[], None] = lambda: None
    trouble: Callable[[], str | None] = lambda: None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    due: float = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > MAX_LOG_BYTES:
            self.log.replace(self.log.with_name(f"{self.log.name}.1"))
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
                preexec_fn=_end_with_parent(os.getpid()),
            )
        self.started = time.monotonic()
        self.after_start()

    def signal(self, number: int) -> None:
        """Send a signal to it and to all that it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


class Supervisor:
    """Runs children, started in their order, stopped in the reverse one, until it is told to stop.

    `say` receives one line about each event.
    """

    def __init__(self, children: list[Child], say: Callable[[str], None]) -> None:
        self.children = children
        self.say = say

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the children while the block runs; call `check` in it now and then."""
        try:
            for child in self.children:
                child.start()
                self.say(f"{child.name} started")
            yield
        finally:
            self.stop()

    def check(self) -> None:
        """End what hangs, and restart what has ended, if its pause is over."""
        now = time.monotonic()
        for child in self.children:
            if child.is_alive:
                if trouble := child.trouble():
                    self.say(f"{child.name} hangs: {trouble}; ending it")
                    child.signal(signal.SIGKILL)
                continue
            if child.process is not None:
                self._note_end(child, now)
            elif now >= child.due:
                child.start()
                self.say(f"{child.name} started again")

    def stop(self) -> None:
        """Stop all children and what they have started: ask first, then kill."""
        alive = [child for child in reversed(self.children) if child.process is not None]
        for child in alive:
            child.signal(signal.SIGTERM)
        give_up = time.monotonic() + STOPPING_S
        while any(child.is_alive for child in alive) and time.monotonic() < give_up:
            time.sleep(0.05)
        for child in alive:
            child.signal(signal.SIGKILL)
            assert child.process is not None
            child.process.wait()

    def _note_end(self, child: Child, now: float) -> None:
        assert child.process is not None
        child.signal(signal.SIGKILL)  # what it started ends with it
        lasted = now - child.started > LASTED_S
        child.pause_s = FIRST_PAUSE_S if lasted else child.pause_s
        status = child.process.returncode
        reason = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        self.say(
            f"{child.name} ended ({reason}); restarting it in "
            f"{child.pause_s:g} s; its log: {child.log}"
        )
        child.process = None
        child.due = now + child.pause_s
        child.pause_s = min(2 * child.pause_s, LONGEST_PAUSE_S)


class Heartbeat:
    """The trainer's side: touches the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._until = math.inf

    def start(self) -> None:
        """Give signs, in a thread of their own, until this process ends."""
        threading.Thread(target=self._give_signs, name="pulse", daemon=True).start()

    @contextmanager
    def during(self, limit_s: float) -> Iterator[None]:
        """Give no more signs once the block runs longer than its limit, in seconds."""
        self._until = time.monotonic() + limit_s
        try:
            yield
        finally:
            self._until = math.inf

    def _give_signs(self) -> None:
        while True:
            if time.monotonic() < self._until:
                with contextlib.suppress(OSError):  # a full disk must not stop a training
                    self.path.touch()
            time.sleep(BEAT_S)


class HeartbeatMonitor:
    """The daemon's side: looks when the file was touched last.

    After `silence_s` without a sign the process counts as hanging, by this process's own clock, so
    a machine that slept does no harm.
    """

    def __init__(self, path: Path, silence_s: float = SILENCE_S) -> None:
        self.path = path
        self.silence_s = silence_s
        self._last_sign = 0
        self._seen_at = 0.0

    def begin(self) -> None:
        """Start afresh: a process has been started, and gives its first sign when it is ready."""
        self.path.unlink(missing_ok=True)

    def problem(self) -> str | None:
        """Return, once, how the process hangs; None while it gives signs."""
        try:
            sign = self.path.stat().st_mtime_ns
        except OSError:
            return None
        now = time.monotonic()
        if sign != self._last_sign:
            self._last_sign, self._seen_at = sign, now
        if now - self._seen_at < self.silence_s:
            return None
        self.begin()
        return f"no sign of life for {self.silence_s:g} s"


@contextmanager
def only_one(directory: Path, name: str) -> Iterator[None]:
    """Hold a directory while the block runs, so that no second process works on it.

    It is created if it does not exist; `name` is that of the lock file in it.

    Raises:
        ValueError: If another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        held = FileLock(directory / name).acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"a process already runs in {directory}: stop it first") from error
    with held:
        yield


def log_into(path: Path) -> None:
    """Write what this process logs to a file: nobody may see what it prints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("fedfora")
    package.addHandler(handler)
    package.setLevel(logging.INFO)


class Stopped(BaseException):
    """The process was told to end. Not an Exception, so that no handler on the way catches it."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the block when this process is told to end, and swallow it outside."""

    def stop(number: int, frame: object) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.suppress(Stopped):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent(parent: int) -> Callable[[], None]:
    """Return what the new process does first: it asks to be ended when this one ends."""

    def ask() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # gone in between
                os._exit(1)

    return ask


def exit_with_parent() -> None:
    """From now on, end this process, one of Flower's, once the one that started it is gone.

    Flower looks for the parent in a thread of its own and raises SIGINT in that thread. Python
    handles signals in the main thread, and one that waits without a limit, as for a push that is
    retried forever, never gets to it. A signal to the whole process wakes the main thread up.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
