"""fedfora predict: answer the rows of a file with an adapter, in batches.

    fedfora predict --model_dir out/adapter --test_file test.json --output_dir out/answers

The adapter knows its base; give --model_name_or_path if the base has moved, or to answer without
an adapter.
"""

from collections.abc import Sequence

from fedfora.cli.console import announce_loading, silence_libraries
from fedfora.config import ConfigParser
from fedfora.evaluation.output import preflight
from fedfora.evaluation.settings import NO_EFFECT, SECTIONS, PredictSettings


def run(argv: Sequence[str]) -> None:
    """Parse, predict, and print the scores."""
    parser = ConfigParser(SECTIONS.values(), description=__doc__, without=NO_EFFECT)
    given = parser.values(argv)
    settings = PredictSettings(frozenset(given), *parser.build(given))
    silence_libraries()
    checked = preflight(settings)
    announce_loading("predict")
    from fedfora.evaluation.predict import predict
    from fedfora.reporting.view import View
    from fedfora.reporting.wording import score_lines

    with View(1) as view:
        scores = predict(checked, view)
    print("\n".join(score_lines(scores)))
    print(f"predictions and scores: {settings.predict.output_dir}")
