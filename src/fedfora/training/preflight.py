"""What would keep a training from working, as far as that is known before anything is loaded.

Rows, directories and names are checked first, so that a mistake there is reported at once.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from fedfora.config import read_yaml
from fedfora.data.loading import Example, load_chosen, load_examples
from fedfora.models.resolve import check_start, check_targets, checked_model_name
from fedfora.privacy.accounting import Release
from fedfora.privacy.ledger import open_ledger
from fedfora.privacy.settings import PrivacyArguments
from fedfora.reporting.record import check_output_dir
from fedfora.reporting.trackers import OF_TRANSFORMERS, check_trackers
from fedfora.training.checkpoints import (
    IDENTIFYING,
    NEWEST_ALIASES,
    check_same,
    checkpoint_to_resume,
    identity_of,
    newest_checkpoint,
    read_progress,
    step_of,
)
from fedfora.training.settings import TrainSettings, check_device, planned_release

LOCAL = "local"  # what a private training keeps to itself: checkpoints, losses; never published
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
    resume_from, _, _ = place_of(settings)
    reports(settings.launch.report_to)
    check_device(settings.train, settings.model.device)
    checked_model_name(settings.model)
    check_targets(settings.model, settings.adapter.target_modules)
    check_start(settings.adapter)
    if settings.launch.deepspeed is not None:
        check_deepspeed(settings.launch.deepspeed)
    rows = read_rows(settings)
    if settings.privacy.privacy_unit == "record":
        plan = planned_release(settings.train, settings.privacy, len(rows.examples))
        left = plan.count - (0 if resume_from is None else step_of(resume_from))
        _check_budget(settings.privacy, ledger_of(rows.examples), plan, left)
    return rows


def _check_budget(privacy: PrivacyArguments, ledger: str, plan: Release, left: int) -> None:
    """Raise if a ledger holds too much for the steps of a plan that are left."""
    opened, noise = open_ledger(privacy, ledger), plan.noise_multiplier
    if left > 0:
        if privacy.noise_multiplier is None:
            noise = opened.noise_for(plan.sampling_rate, planned=plan.count, left=left)
        opened.check(replace(plan, noise_multiplier=noise, count=left))


def read_rows(settings: TrainSettings) -> Rows:
    """Return the rows; raise if no file was named, it cannot be read, or a row is broken."""
    data, validation_file = settings.data, settings.validation.validation_file
    return Rows(
        load_chosen(data.train_file, data, flag="--train_file"),
        None if validation_file is None else load_examples(validation_file, data),
    )


def ledger_of(examples: Iterable[Example]) -> str:
    """Return the name of the ledger of some rows: the same for the same rows in any order."""
    rows = sorted(
        hashlib.sha256(repr(sorted(each.columns.items())).encode()).digest() for each in examples
    )
    return f"rows-{hashlib.sha256(b''.join(rows)).hexdigest()[:16]}"


def place_of(settings: TrainSettings) -> tuple[Path | None, bool, bool]:
    """Return the checkpoint to resume from, if it is in this run, and if a run here is replaced.

    Raises:
        ValueError: If the directory is taken, or what is to be resumed began with other settings.
    """
    run, resume = settings.run, settings.checkpoint.resume_from_checkpoint
    checkpoints = checkpoints_of(settings)
    resume_from = checkpoint_to_resume(str(checkpoints), resume)
    resumes_here = bool(resume_from and resume_from.resolve().parent == checkpoints.resolve())
    overwrite = run.overwrite_output_dir or begins_again(settings)
    check_output_dir(
        run.output_dir,
        overwrite=overwrite or resumes_here,
        to_resume="--resume_from_checkpoint last",
    )
    if resume_from is not None:
        read_progress(resume_from, identity_of(asdict(settings)))
    return resume_from, resumes_here, overwrite


def begins_again(settings: TrainSettings) -> bool:
    """Say whether "last" means the beginning: the same training was stopped before a checkpoint.

    Raises:
        ValueError: If the directory holds a finished run, or one with other settings.
    """
    run, directory = settings.run, Path(settings.run.output_dir)
    path = directory / "config.yaml"
    resumes = settings.checkpoint.resume_from_checkpoint in NEWEST_ALIASES
    begun = (directory / "metrics.jsonl").is_file()
    if not resumes or newest_checkpoint(checkpoints_of(settings)) or not begun:
        return False
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"--output_dir {run.output_dir} holds a finished adapter, but no checkpoint to resume: "
            "--overwrite_output_dir starts over"
        )
    if path.is_file():  # it is written after metrics.jsonl
        stored = read_yaml(path, "--resume_from_checkpoint last: ")
        if not (
            isinstance(stored, dict) and all(isinstance(stored.get(n), dict) for n in IDENTIFYING)
        ):
            raise ValueError(f"--resume_from_checkpoint last: {path} does not belong to a training")
        check_same(run.output_dir, *map(identity_of, (stored, asdict(settings))))
    return True


def checkpoints_of(settings: TrainSettings) -> Path:
    """Return where checkpoints are; with losses and digests of private rows they stay local."""
    run_dir = Path(settings.run.output_dir)
    return run_dir if settings.privacy.privacy_unit == "none" else run_dir / LOCAL


def reports(names: list[str]) -> list[str]:
    """Return what transformers is told to report to: trackers, or the word "all" or "none".

    "auto" is TensorBoard where it is installed, and nobody elsewhere.

    Raises:
        ValueError: If a tracker is unknown or not installed.
    """
    if names == ["auto"]:
        return ["tensorboard" if find_spec("tensorboard") else "none"]
    if names != ["all"]:
        check_trackers(names, OF_TRANSFORMERS)
    return names


def check_deepspeed(config: str) -> None:
    """Raise if DeepSpeed could not start with this configuration.

    Raises:
        ValueError: If there is no such file, DeepSpeed is not installed, or a build of its
            operators that was killed has left a lock on which every later run waits forever.
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
