"""fedfora evaluate: score a predictions file."""

from collections.abc import Sequence
from pathlib import Path

from fedfora.cli.console import silence_libraries
from fedfora.config import ConfigParser
from fedfora.evaluation.settings import EvaluateArguments
from fedfora.reporting.record import write_json
from fedfora.reporting.wording import score_lines


def run(argv: Sequence[str]) -> None:
    """Parse, score, and print the scores."""
    (settings,) = ConfigParser([EvaluateArguments], description=__doc__).parse(argv)
    silence_libraries()
    written, read = settings.scores_file, settings.predictions_file
    if written is not None and Path(written).resolve() == Path(read).resolve():
        raise ValueError(f"--scores_file {written} is the file of predictions")
    from fedfora.evaluation.scores import score_file

    scores = score_file(settings)
    if written is not None:
        try:
            write_json(Path(written), scores)
        except OSError as error:
            raise ValueError(f"--scores_file {written}: {error}") from error
    print("\n".join(score_lines(scores)))
