"""Checkpoint directories of a training: which are complete, which is newest, what they belong to.

A checkpoint is `checkpoint-STEP` in the run directory: the adapter (safetensors), what the Trainer
needs to resume (`trainer_state.json`; `optimizer.pt`, `scheduler.pt`, `rng_state*.pth`: tensors and
numbers, read back with torch's weights_only loader, which runs no code), and at last
`progress.json`. A directory without that one was being written when the training was killed; it is
not used.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedfora.reporting.record import is_ours, write_json

PROGRESS = "progress.json"
NEWEST_ALIASES = ("last", "true", "True")
IDENTIFYING = ("model", "adapter", "data", "train", "privacy")  # sections of the settings
FACTS = {"base_fingerprint", "rows_fingerprint", "num_processes"}  # known once all is loaded

# What may differ between the pieces of one training: where and how often is written, not what.
MAY_DIFFER = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps"),
    *("save_total_limit", "logging_steps", "report_to", "local_rank", "deepspeed"),
    *("cache_dir", "overwrite_cache", "preprocessing_num_workers", "per_device_eval_batch_size"),
    "canary_site",  # a training is site 0
}


@dataclass
class Progress:
    """What a training has seen so far, over all processes.

    Args:
        tokens: Tokens read, padding left out.
        answer_tokens: Tokens with a loss.
        loss_sum: The steps' losses, added up.
        seconds: Wall time of earlier pieces of the same training.
        metrics_bytes: Length of metrics.jsonl after the last step counted here.
    """

    tokens: int = 0
    answer_tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    metrics_bytes: int = 0


def checkpoint_to_resume(output_dir: str, resume_from: str | None) -> Path | None:
    """Return the checkpoint to resume from; None to start at the beginning.

    Args:
        output_dir: The run directory.
        resume_from: A checkpoint's directory; "last" or "true" for the newest whole one in the run
            directory, if there is any; None to start afresh.

    Raises:
        ValueError: If the named directory is not a complete checkpoint.
    """
    if resume_from is None:
        return None
    if resume_from in NEWEST_ALIASES:
        return newest_checkpoint(Path(output_dir))
    path = Path(resume_from)
    if not (path / PROGRESS).is_file():
        what = "holds no complete checkpoint" if path.is_dir() else "does not exist"
        raise ValueError(
            f"--resume_from_checkpoint {resume_from} {what} (last: the newest in --output_dir)"
        )
    return path


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the complete checkpoint with the most steps; None if there is no such checkpoint."""
    complete = [path for path in _checkpoints(run_dir) if (path / PROGRESS).is_file()]
    return max(complete, key=step_of, default=None)


def remove_checkpoints(run_dir: Path, *, keep_up_to: Path | None) -> None:
    """Remove checkpoints that do not belong to the training that begins now; no other program's.

    Whole ones up to `keep_up_to`, the one to resume from, stay; None removes all.
    """
    for path in list(_checkpoints(run_dir)):
        is_complete = (path / PROGRESS).is_file()
        stays = keep_up_to is not None and is_complete and step_of(path) <= step_of(keep_up_to)
        if is_ours(path) and not stays:
            shutil.rmtree(path)


def write_progress(checkpoint: Path, progress: Progress, identity: Mapping[str, Any]) -> None:
    """Write what makes a checkpoint whole: how far it is, and which training it belongs to."""
    content = {"progress": asdict(progress), "identity": dict(identity)}
    write_json(checkpoint / PROGRESS, content)


def read_progress(checkpoint: Path, identity: Mapping[str, Any]) -> Progress:
    """Return how far a checkpoint is.

    Raises:
        ValueError: If it belongs to another training, naming what differs.
    """
    try:
        content = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        stored, progress = dict(content["identity"]), Progress(**content["progress"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: {PROGRESS} cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    check_same(checkpoint, stored, identity)
    return progress


def check_same(place: str | Path, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise if a place holds another training, as far as `identity` is known."""
    for name in sorted((stored.keys() - FACTS | identity.keys()) - MAY_DIFFER):
        if stored.get(name) != identity.get(name):
            raise ValueError(
                f"--resume_from_checkpoint {place}: {name} was {stored.get(name)}, now it is "
                f"{identity.get(name)}; a training resumes only with what it began with"
            )


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written.

    Raises:
        ValueError: If the directory's name is not `checkpoint-STEP`.
    """
    if not checkpoint.name.removeprefix("checkpoint-").isdigit():
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: a checkpoint's directory is named "
            "checkpoint-STEP"
        )
    return int(checkpoint.name.removeprefix("checkpoint-"))


def identity_of(settings: Mapping[str, Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """Return what must be the same in every piece of one training: settings that matter, and facts.

    `settings` are sections and their fields, as `dataclasses.asdict` gives them; `facts` are those
    of `FACTS`, and are left out where nothing has been loaded yet.
    """
    flat = {name: v for section in IDENTIFYING for name, v in settings[section].items()}
    return {name: v for name, v in flat.items() if name not in MAY_DIFFER} | facts


def _checkpoints(run_dir: Path) -> Iterator[Path]:
    for path in run_dir.glob("checkpoint-*"):
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
            yield path
