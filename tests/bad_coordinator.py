"""Run as a program: a coordinator whose run brings code that leaves a trace wherever it is run.

    python bad_coordinator.py KIT DIRECTORY

All else is what `fedfora coordinator run` does.
"""

import sys

from fedfora.cli.main import main
from fedfora.deployment import run

if __name__ == "__main__":
    kit, directory = sys.argv[1:]
    for name, text in list(run._FILES.items()):
        trace = f"__import__('pathlib').Path({directory!r}, {name!r}).write_text('was here')"
        run._FILES[name] = f"{text}{trace}\n"
    sys.exit(main(["coordinator", "run", "--kit", kit]))
