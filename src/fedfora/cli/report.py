"""fedfora report RUN...: one self-contained HTML page from run directories.

Several runs are shown side by side. The page needs no network and no scripts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfora.config import ConfigError, ConfigParser, flag


@dataclass
class ReportArguments:
    """Which runs, and where the page goes."""

    runs: list[str] = flag([], "run directories; also the words before the options")
    output_file: str | None = flag(
        None, "file to write; default report.html in the run directory, or here for several runs"
    )
    no_examples: bool = flag(False, "leave out the answered test rows, e.g. patients' texts")


def run(argv: Sequence[str]) -> None:
    """Parse, write the page, and say where it is."""
    (arguments,) = ConfigParser([ReportArguments], description=__doc__, first="runs").parse(argv)
    runs = arguments.runs
    if not runs:
        raise ConfigError("no run given: fedfora report RUN..., e.g. fedfora report out/demo")
    from fedfora.reporting.report import FILE, write_report

    path = Path(arguments.output_file or (Path(runs[0]) / FILE if len(runs) == 1 else FILE))
    if arguments.output_file and not path.absolute().parent.is_dir():
        raise ValueError(f"--output_file {path}: no such directory: {path.parent}")
    write_report(runs, path, no_examples=arguments.no_examples)
    print(f"report: {path}")
