"""What would keep a training from its work, as far as that can be known before anything is loaded.

Rows, directories and names are checked first, so that a mistake there is reported at once.
"""

from dataclasses import dataclass

from fedfora.data.loading import Example, load_chosen, load_examples
from fedfora.models.resolve import check_targets, checked_model_name
from fedfora.privacy.settings import check_delta
from fedfora.reporting.record import check_output_dir
from fedfora.training.settings import TrainSettings


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
    resumes = settings.checkpoint.resume_from_checkpoint is not None
    check_output_dir(
        settings.run.output_dir,
        overwrite=settings.run.overwrite_output_dir or resumes,
        to_resume="--resume_from_checkpoint last",
    )
    checked_model_name(settings.model)
    check_targets(settings.model, settings.adapter.target_modules)
    rows = read_rows(settings)
    check_delta(settings.privacy, len(rows.examples))
    return rows


def read_rows(settings: TrainSettings) -> Rows:
    """Return the rows.

    Raises:
        ValueError: If no file was named, it cannot be read, or a row is broken.
    """
    data, validation_file = settings.data, settings.validation.validation_file
    return Rows(
        load_chosen(data.train_file, data, flag="--train_file"),
        None if validation_file is None else load_examples(validation_file, data),
    )
