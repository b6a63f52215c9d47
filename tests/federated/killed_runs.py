"""Run as a program by test_resuming.py: a federation killed again and again, and resumed each time.

    python killed_runs.py SETTINGS.json OUTPUT_DIR SEED NUM_POINTS NUM_TIMERS

Every life of the run is a forked process, so the base is loaded once for all. Two ways to die, by
a signal that nothing catches: at the n-th change to the run directory's files, so between any two
of them; and after a random time of the processor, which a busy machine does not shorten. Prints
one JSON line with what happened.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

STARTER = os.getppid()
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def die_at_change(directory, n):
    """Kill this process before the n-th change below `directory`."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event not in CHANGES or not str(arguments[0]).startswith(directory):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return lambda: seen


def live(settings, directory, *, change=None, cpu_s=None):
    """Run or resume in a forked process; return whether it came to the end."""
    if os.getppid() != STARTER:
        sys.exit("whoever started this is gone")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if change is not None:
                die_at_change(directory, change)
            if cpu_s is not None:
                signal.setitimer(signal.ITIMER_PROF, cpu_s)
            _run(settings, directory)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status == 0 or os.WIFSIGNALED(status):
        return status == 0
    sys.exit(f"the run failed by itself, status {status}")


def _run(settings, directory):
    from rich.console import Console

    from fedfora.federated.preflight import resolve_settings
    from fedfora.federated.settings import from_run_config, settings_parser
    from fedfora.federated.simulation import simulate
    from fedfora.reporting.view import View

    if (Path(directory) / "config.yaml").exists():
        chosen = resolve_settings({"resume": directory}, settings_parser())
    else:
        chosen = from_run_config(
            {**settings, "output_dir": directory, "overwrite_output_dir": True}
        )
    simulate(chosen, View(1, Console(quiet=True)))


def measure(settings, directory):
    """Return how many changes a whole run makes, and its seconds of the processor."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        seen = die_at_change(directory, -1)
        _run(settings, directory)
        os.write(writer, str(seen()).encode())
        os._exit(0)
    _, _, used = os.wait4(child, 0)
    return int(os.read(reader, 32)), used.ru_utime + used.ru_stime


def main():
    """Kill at random changes, then at random times; each time until the run is through."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    directory, seed, num_points, num_timers = sys.argv[2], *map(int, sys.argv[3:])
    import fedfora.federated.simulation  # noqa: F401  # once, for all lives

    rng = random.Random(seed)
    total, whole_s = measure(settings, f"{directory}-0")
    points = rng.sample(range(1, total + 1), min(num_points, total))
    deaths, runs = 0, [f"{directory}-0"]
    for number, point in enumerate(points, start=1):
        run = f"{directory}-{number}"
        deaths += not live(settings, run, change=point)
        while not live(settings, run):
            pass
        runs.append(run)
    run = f"{directory}-timed"
    for _ in range(num_timers):
        if live(settings, run, cpu_s=rng.uniform(0.02, 0.6) * whole_s):
            break
        deaths += 1
    live(settings, run)
    print(json.dumps({"changes": total, "deaths": deaths, "runs": [*runs, run]}))


if __name__ == "__main__":
    main()
