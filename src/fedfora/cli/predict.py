"""fedfora predict: answer the rows of a file with an adapter, in batches.

    fedfora predict --model_dir out/adapter --test_file test.json --output_dir out/answers

The adapter knows its base; --model_name_or_path is for a base that lies elsewhere now, or that
answers without an adapter.
"""

from collections.abc import Sequence
from pathlib import Path

from fedfora.cli.console import announce_loading, silence_libraries
from fedfora.config import ConfigParser
from fedfora.data.loading import Example, load_chosen
from fedfora.evaluation.settings import NO_EFFECT, SECTIONS, PredictSettings
from fedfora.models.resolve import adapter_dir_of, check_named
from fedfora.reporting.record import check_output_dir


def run(argv: Sequence[str]) -> None:
    """Parse, predict, and print the scores."""
    parser = ConfigParser(
        SECTIONS.values(), prog="fedfora predict", description=__doc__, without=NO_EFFECT
    )
    given = parser.values(argv)
    settings = PredictSettings(frozenset(given), *parser.build(given))
    silence_libraries()
    _, examples = preflight(settings)
    announce_loading("predict")
    from fedfora.evaluation.predict import predict
    from fedfora.reporting.view import View
    from fedfora.reporting.wording import score_lines

    with View(1) as view:
        scores = predict(settings, view, examples)
    for line in score_lines(scores):
        print(line)
    print(f"predictions and scores: {settings.predict.output_dir}")


def preflight(settings: PredictSettings) -> tuple[Path | None, list[Example]]:
    """Return the adapter's directory, None for the base alone, and the rows, if both will do.

    Nothing heavy is loaded to find out.

    Raises:
        ValueError: Naming the flag, or the file and the line.
    """
    predict = settings.predict
    adapter_dir = adapter_dir_of(predict.model_dir, predict.checkpoint_dir)
    check_named(settings.model, adapter_dir)
    check_output_dir(predict.output_dir, overwrite=True)
    examples = load_chosen(
        settings.data.test_file,
        settings.data,
        flag="--test_file",
        answers_needed=not predict.predict_with_generate,
    )
    return adapter_dir, examples[: settings.evaluation.max_eval_samples]
