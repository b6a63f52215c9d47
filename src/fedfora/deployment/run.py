"""One run of a real federation, to its end: started, followed, and restarted if it is killed.

The results are in `state/runs/NAME` of the coordinator's kit.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedfora.config import Scalar
from fedfora.deployment import run_state
from fedfora.deployment.coordinator import CHECK_S, Coordinator
from fedfora.deployment.flower_processes import FlowerCommandError
from fedfora.deployment.journal import RUN_NAME
from fedfora.deployment.kit import CoordinatorKit, template
from fedfora.deployment.run_state import Attempt, PlannedRun, read_attempt, settings_for
from fedfora.federated.coordinator.checkpoint import find_checkpoints
from fedfora.federated.settings_scope import common_part
from fedfora.reporting.history import Follower
from fedfora.reporting.record import write_text
from fedfora.reporting.wording import describe

MAX_FAILED_STARTS = 9  # starts without a further round, after which a person must look
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 600.0  # between them; each is twice the one before
SILENCE_S = 60.0  # of silence, after which it says where the logs are
BEGIN_S = 300.0  # Flower starts a run's process within this time, or its SuperLink is restarted

PACKAGE = "fedfora_app"

_SIDE = '"""{}"""\n\nfrom fedfora.deployment.{} import app\n\n__all__ = ["app"]\n'
_FILES = {
    "__init__.py": '"""All that travels of a run. Each side runs what it installed."""\n',
    "server.py": _SIDE.format("The coordinator's side.", "server_app"),
    "client.py": _SIDE.format("A site's side.", "client_app"),
}

Say = Callable[[str], None]


def run_to_the_end(kit: CoordinatorKit, say: Say, *, new: bool = False) -> Path:
    """Run a federation, its processes included, and return the run's directory.

    `say` receives one line about each event; `new` starts a new run even if the last one has not
    finished.

    Raises:
        ValueError: If the run stopped; with the reason. What is finished is kept.
    """
    coordinator = Coordinator(kit, say)
    try:
        with coordinator.running():
            run = plan_run(kit, say, new=new)
            coordinator.note("run", run=run.name, attempt=run.attempt, settings=run.run_config)
            try:
                directory = follow_run(coordinator, run, say)
            except Exception as error:
                facts = {"status": run_state.STOPPED, "reason": str(error)}
                coordinator.alarm("run_ended", run=run.name, **facts)
                raise
            coordinator.alarm("run_ended", run=run.name, status=run_state.FINISHED)
            return directory
    except OSError as error:  # a full disk, above all
        raise ValueError(f"{error}; once that is fixed, the same command resumes") from error


def plan_run(kit: CoordinatorKit, say: Say, *, new: bool) -> PlannedRun:
    """Return the newest run if it has not ended, or a new one."""
    last = run_state.read_run(kit.state)
    if last is not None and not new:
        attempt = read_attempt(kit.state, last)
        if attempt is None or attempt.status != run_state.FINISHED:
            say(f"run {last.name} resumes with the settings it began with (--new starts another)")
            return last
    names = [path.name for path in (kit.state / run_state.RUNS).glob("[0-9]*")]
    number = 1 + max([0, *(int(name) for name in names if name.isdecimal())])
    name = f"{number:03d}"
    settings = settings_for(kit, kit.state / run_state.RUNS / name)
    return PlannedRun(f"{kit.federation}/{name}", 0, settings.run_config())


def follow_run(coordinator: Coordinator, run: PlannedRun, say: Say) -> Path:
    """Start a run, and restart it whenever its process is lost, until it ends.

    Raises:
        ValueError: If it stopped; with the reason.
    """
    state = coordinator.kit.state
    directory = Path(str(run.run_config["output_dir"]))
    follower = Follower(directory)
    follower.new()  # an earlier command has shown them
    failed_starts, furthest = 0, 0
    while True:
        run = _next_attempt(run, directory)
        run_state.write_run(state, run)
        attempt = _attempt(coordinator, run, follower, say)
        if attempt is not None and attempt.status == run_state.FINISHED:
            return directory
        if attempt is not None and attempt.status == run_state.STOPPED:
            raise ValueError(attempt.reason)
        reason = "was cut off" if attempt is None else f"failed ({attempt.reason})"
        reached = max(find_checkpoints(directory), default=0) if directory.is_dir() else 0
        failed_starts = 0 if reached > furthest else failed_starts + 1
        furthest = max(furthest, reached)
        if failed_starts == MAX_FAILED_STARTS:
            raise ValueError(
                f"{reason}, {failed_starts} times after round {reached}; see {state}/logs"
            )
        pause_s = failed_starts and min(FIRST_PAUSE_S * 2 ** (failed_starts - 1), LONGEST_PAUSE_S)
        when = f" in {pause_s:g} s" * bool(pause_s)
        say(f"run {run.name} {reason}; restarting it{when}")
        again = time.monotonic() + pause_s
        while time.monotonic() < again:
            _pause(coordinator)


def _attempt(
    coordinator: Coordinator, run: PlannedRun, shown: Follower, say: Say
) -> Attempt | None:
    """Start a run and follow it; return how it ended, None if its process is gone."""
    state = coordinator.kit.state
    silence = Silence(say, state / "logs")
    attempt = read_attempt(state, run) if _start(coordinator, run, silence) else None
    while attempt is not None and attempt.status == run_state.BEGUN and attempt.is_running:
        _pause(coordinator)
        if tell(shown, say):
            silence.end()
        silence.check("no news from the run: it is waiting for its sites, or they are loading")
        attempt = read_attempt(state, run)
    tell(shown, say)
    attempt = attempt and read_attempt(state, run)  # it may have ended since it was last read
    return attempt if attempt is not None and attempt.status != run_state.BEGUN else None


class Silence:
    """Says, once, where the logs are when nothing was heard for long."""

    def __init__(self, say: Say, logs: Path) -> None:
        self.say = say
        self.logs = logs
        self._since = time.monotonic()

    def check(self, what: str) -> None:
        """Say what is still missing, if it has been for long."""
        if time.monotonic() - self._since > SILENCE_S:
            self.say(f"{what} (for {SILENCE_S:g} s); see {self.logs}")
            self.end()

    def end(self) -> None:
        """Something was heard."""
        self._since = math.inf


def _next_attempt(run: PlannedRun, directory: Path) -> PlannedRun:
    """Return the run as it is started next: from its newest checkpoint, or from the beginning."""
    again: dict[str, Scalar]
    if directory.is_dir() and find_checkpoints(directory):
        again = {"resume": str(directory)}
    else:
        again = {"overwrite_output_dir": True} if directory.exists() else {}
    before = ("overwrite_output_dir", "resume")
    config = {k: v for k, v in run.run_config.items() if k not in before}
    return PlannedRun(run.name, run.attempt + 1, {**config, **again})


def _start(coordinator: Coordinator, run: PlannedRun, silence: Silence) -> bool:
    """Start the run; return whether its process has begun in time."""
    kit = coordinator.kit
    while not (coordinator.certificate_holds and coordinator.knows_all_sites):
        _pause(coordinator)
        silence.check("the SuperLink does not answer yet, or has not let all sites in")
    app = kit.state / "app"
    write_app(app, {**common_part(run.run_config), RUN_NAME: run.name})
    starts = coordinator.starts
    try:
        coordinator.flower.start(app)
    except FlowerCommandError as error:
        coordinator.say(str(error))
        return False
    give_up = time.monotonic() + BEGIN_S
    while read_attempt(kit.state, run) is None:
        if coordinator.starts != starts:
            return False
        if time.monotonic() > give_up:
            coordinator.say("the SuperLink does not start the run; restarting the SuperLink")
            coordinator.restart_superlink()
            return False
        _pause(coordinator)
        silence.check("the SuperLink has not started the run yet")
    return True


def _pause(coordinator: Coordinator) -> None:
    time.sleep(CHECK_S)
    coordinator.check()


def tell(shown: Follower, say: Say) -> bool:
    """Show what a run has recorded since, and return whether there was anything."""
    texts = [text for event in shown.new() if (text := describe(event))]
    for text in texts:
        say(text)
    return bool(texts)


def write_app(directory: Path, run_config: Mapping[str, Scalar]) -> None:
    """Write the Flower app that a run consists of: three small files, and the settings that travel.

    What is there is overwritten.
    """
    package = directory / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        write_text(package / name, text)
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in run_config.items())
    project = template("flower_app.toml.template").substitute(settings=settings)
    write_text(directory / "pyproject.toml", project)
