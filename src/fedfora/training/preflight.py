"""What would keep a training from its work, as far as that can be known before anything is loaded.

Rows, directories and names are checked first, so that a mistake there is reported at once.
"""

import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedfora.data.loading import Example, load_chosen, load_examples
from fedfora.models.resolve import check_start, check_targets, checked_model_name
from fedfora.privacy.settings import check_delta
from fedfora.reporting.record import check_output_dir
from fedfora.training.checkpoints import checkpoint_to_resume
from fedfora.training.settings import TrainSettings

STALE_LOCK_S = 600  # DeepSpeed's operators compile in about two minutes


@dataclass(frozen=True)
class Rows:
    """The rows of a training, and those it is judged on, if any."""

    examples: list[Example]
    held_out: list[Example] | None


def preflight(settings: TrainSettings) -> Rows:
    """Return the rows, if they can be read and what else was named is there.

    Raises:
        ValueError: Naming the flag, or the file and the line.
    """
    resume, output_dir = settings.checkpoint.resume_from_checkpoint, settings.run.output_dir
    checkpoint_to_resume(output_dir, resume)
    check_output_dir(
        output_dir,
        overwrite=settings.run.overwrite_output_dir or resume is not None,
        to_resume="--resume_from_checkpoint last",
    )
    checked_model_name(settings.model)
    check_targets(settings.model, settings.adapter.target_modules)
    check_start(settings.adapter)
    if settings.launch.deepspeed is not None:
        check_deepspeed(settings.launch.deepspeed)
    rows = read_rows(settings)
    check_delta(settings.privacy, len(rows.examples))
    return rows


def read_rows(settings: TrainSettings) -> Rows:
    """Return the rows; raise if no file was named, it cannot be read, or a row is broken."""
    data, validation_file = settings.data, settings.validation.validation_file
    return Rows(
        load_chosen(data.train_file, data, flag="--train_file"),
        None if validation_file is None else load_examples(validation_file, data),
    )


def check_deepspeed(config: str) -> None:
    """Raise if DeepSpeed could not start with this configuration.

    Raises:
        ValueError: If there is no such file, DeepSpeed is not installed, or a build of its
            operators that was killed has left a lock on which every later run waits for ever.
    """
    if not Path(config).is_file():
        raise ValueError(f"--deepspeed: no such file: {config}")
    if find_spec("deepspeed") is None:
        raise ValueError(
            '--deepspeed: DeepSpeed is not installed (pip install --no-build-isolation "deepspeed")'
        )
    for lock in stale_locks():
        raise ValueError(
            f"--deepspeed: {lock} is {_age_s(lock) / 60:.0f} minutes old: a build of DeepSpeed's "
            "operators was killed and left it; every run would wait for it. Remove it"
        )


def stale_locks() -> list[Path]:
    """Return the locks of PyTorch's extension builds that nobody can be holding any more."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return sorted(lock for lock in locks if _age_s(lock) > STALE_LOCK_S)


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime
