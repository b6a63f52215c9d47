"""What the user says about the run directory."""

from dataclasses import dataclass

from fedfora.config import flag


@dataclass
class RunArguments:
    """Where a run leaves its results."""

    output_dir: str = flag("out", "run directory: adapter, metrics, configuration")
    overwrite_output_dir: bool = flag(False, "write over an earlier run in output_dir")
