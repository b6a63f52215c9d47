"""fedfora evaluate: score a predictions file."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedfora.config import ConfigParser, flag
from fedfora.evaluation.settings import METRICS_HELP, ORIGINAL_HELP, MetricsChoice
from fedfora.reporting.wording import score_lines


@dataclass
class EvaluateArguments:
    """Predictions to score, and their columns."""

    predictions_file: str = flag("out/predictions.jsonl", "rows with prediction and reference")
    metrics: MetricsChoice = flag("auto", METRICS_HELP)
    prediction_column: str = flag("prediction", "column with what the model wrote")
    reference_column: str = flag("reference", "column with what is right")
    original_scores: bool = flag(False, ORIGINAL_HELP)
    seed: int = flag(42, "seed of the confidence intervals")
    scores_file: str | None = flag(None, "write the scores there too, as JSON")


def run(argv: Sequence[str]) -> None:
    """Parse, score, and print the scores."""
    parser = ConfigParser([EvaluateArguments], prog="fedfora evaluate", description=__doc__)
    (settings,) = parser.parse(argv)
    from pathlib import Path

    from fedfora.cli.console import silence_libraries
    from fedfora.evaluation.scores import score_file
    from fedfora.reporting.record import write_json

    silence_libraries()
    written, read = settings.scores_file, settings.predictions_file
    if written is not None and Path(written).resolve() == Path(read).resolve():
        raise ValueError(f"--scores_file {written} is the file of predictions")
    scores = score_file(
        settings.predictions_file,
        metrics=settings.metrics,
        prediction_column=settings.prediction_column,
        reference_column=settings.reference_column,
        seed=settings.seed,
        original=settings.original_scores,
    )
    if settings.scores_file is not None:
        try:
            write_json(Path(settings.scores_file), scores)
        except OSError as error:
            raise ValueError(f"--scores_file {settings.scores_file}: {error}") from error
    for line in score_lines(scores):
        print(line)
