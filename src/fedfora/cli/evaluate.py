"""fedfora evaluate: score a predictions file."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedfora.config import ConfigParser, flag
from fedfora.reporting.table import score_lines


@dataclass
class EvaluateArguments:
    """What to score."""

    predictions_file: str = flag("out/predictions.jsonl", "rows with prediction and reference")


def run(argv: Sequence[str]) -> None:
    """Parse, score, and print the scores."""
    parser = ConfigParser([EvaluateArguments], prog="fedfora evaluate", description=__doc__)
    (settings,) = parser.parse(argv)
    from fedfora.evaluation.predict import score_file

    for line in score_lines(score_file(settings.predictions_file)):
        print(line)
