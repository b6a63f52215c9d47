"""The user's settings for evaluation: batches, lengths, how tokens are chosen, which scores."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fedfora.config import Options, flag, read_yaml
from fedfora.data.settings import DataArguments
from fedfora.data.sources import rows_of
from fedfora.models.resolve import check_adapter_dir, check_named
from fedfora.models.settings import ModelArguments

MetricsChoice = Literal["auto", "triples", "text", "choice"]
METRICS_HELP = "kind of scores; auto: judged by the references"
ORIGINAL_HELP = "also score as the original FoRA code did, with its faults"
OPTIONS_COLUMN = "options"


@dataclass
class EvalArguments(Options):
    """Generation: batch size and lengths."""

    per_device_eval_batch_size: int | None = flag(
        None, "prompts per batch; default: up to 64, as memory allows", least=1, often=True
    )
    max_new_tokens: int | None = flag(
        None,
        "maximum answer length in tokens; default: --max_target_length",
        "--max_len",
        least=1,
        often=True,
    )
    max_eval_samples: int | None = flag(None, "evaluate only the first N rows", least=1)


@dataclass
class DecodingArguments(Options):
    """Decoding: greedy unless `--do_sample` or beams."""

    do_sample: bool = flag(False, "sample tokens instead of taking the likeliest", often=True)
    temperature: float = flag(1.0, "with --do_sample: temperature", above=0)
    top_p: float = flag(
        1.0, "with --do_sample: nucleus sampling, probability mass to sample from", within="(0, 1]"
    )
    top_k: int = flag(
        0, "with --do_sample: sample among the k likeliest tokens; 0 for all", least=0
    )
    num_beams: int = flag(1, "number of beams; 1 is no beam search", least=1)
    repetition_penalty: float = flag(
        1.0, "above 1, tokens already present become less likely", above=0
    )
    seed: int = flag(42, "seed of --do_sample and of the confidence intervals")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            value = getattr(self, name)
            if not self.do_sample and value != default:
                raise ValueError(f"--{name} {value} has no effect without --do_sample")


@dataclass
class PredictArguments:
    """Adapter, output and scores."""

    model_dir: str | None = flag(
        None,
        "adapter directory; it names its base model; without it the base model answers",
        often=True,
    )
    checkpoint_dir: str | None = flag(
        None, "a checkpoint instead of the finished adapter: a path, or a name in --model_dir"
    )
    output_dir: str = flag(
        "out/answers", "directory for predictions.jsonl and scores.json", often=True
    )
    overwrite_output_dir: bool = flag(False, "start over, overwriting output_dir", often=True)
    merge: bool = flag(False, "merge the adapter into the base first, for faster generation")
    do_eval: bool = flag(True, "score rows that have references")
    predict_with_generate: bool = flag(
        True, "generate answers; if false, only measure the loss of the references"
    )
    padding_side: Literal["left", "right"] = flag(
        "left", "for scripts of the original program: batches of answers need left, losses take any"
    )
    metrics: MetricsChoice = flag("auto", METRICS_HELP, often=True)
    original_scores: bool = flag(False, ORIGINAL_HELP)
    options_column: str = flag(
        OPTIONS_COLUMN, "column with the options of a multiple-choice row: a list of texts"
    )

    def __post_init__(self) -> None:
        if not self.predict_with_generate and not self.do_eval:
            raise ValueError("nothing to do: neither --predict_with_generate nor --do_eval")


@dataclass(frozen=True)
class PredictSettings:
    """All settings of a prediction; `given` are the names of those the user gave."""

    given: frozenset[str]
    predict: PredictArguments
    model: ModelArguments
    data: DataArguments
    evaluation: EvalArguments
    decoding: DecodingArguments

    def __post_init__(self) -> None:
        """Refuse what is missing, and right padding where a batch's rows are continued."""
        if self.data.test_file is None and self.data.dataset is None:
            raise ValueError("--test_file is missing: a file, or clinic:test (or --dataset)")
        batch_size = self.evaluation.per_device_eval_batch_size
        predict = self.predict
        if predict.padding_side == "right" and predict.predict_with_generate and batch_size != 1:
            raise ValueError(
                "--padding_side right: answers are written at the end of each row, where the "
                "padding would be (--padding_side left, or --per_device_eval_batch_size 1)"
            )


SECTIONS = {item.name: item.type for item in fields(PredictSettings) if item.name != "given"}
NO_EFFECT = {  # options of training rows
    *("train_file", "canaries", "canary_site", "canary_copies"),
    *("preprocessing_num_workers", "overwrite_cache"),
}


@dataclass
class EvaluateArguments:
    """Predictions to score, and their columns."""

    predictions_file: str = flag(
        "out/answers/predictions.jsonl", "rows with prediction and reference"
    )
    metrics: MetricsChoice = flag("auto", METRICS_HELP)
    prediction_column: str = flag("prediction", "column with what the model wrote")
    reference_column: str = flag("reference", "column with the right answer")
    original_scores: bool = flag(False, ORIGINAL_HELP)
    seed: int = flag(42, "seed of the confidence intervals")
    scores_file: str | None = flag(None, "write the scores there too, as JSON")


@dataclass
class AuditArguments(Options):
    """Attacks on a run: its rows, held-out rows, effort."""

    run: str | None = flag(None, "run directory of train, simulate or demo")
    held_out_file: str | None = flag(
        None, "rows of the same kind that were not trained on; default the run's --test_file"
    )
    max_rows: int = flag(500, "rows of each kind that the membership attack uses", least=1)
    canary_alternatives: int = flag(
        255, "other codes that each planted canary is ranked among", least=1
    )


def audited_run(
    arguments: AuditArguments,
) -> tuple[dict[str, Any], DataArguments, ModelArguments, str]:
    """Return the run's configuration, its data, its base, and the file of rows it has not seen.

    Raises:
        ValueError: If the directory holds no run, or there are no rows that were not trained on.
    """
    path = Path(arguments.run or "") / "config.yaml"
    if arguments.run is None or not path.is_file():
        raise ValueError(f"--run {arguments.run}: no run there, config.yaml is missing")
    try:
        config = read_yaml(path, "")
        data, model = DataArguments(**config["data"]), ModelArguments(**config["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--run {arguments.run}: {path} is not a run's: {error}") from error
    check_named(model, None)
    check_adapter_dir(arguments.run)
    held_out = arguments.held_out_file or data.test_file
    if held_out is None or data.train_file is None:
        raise ValueError("--held_out_file is missing: rows of the same kind, not trained on")
    for file in (data.train_file, held_out):
        next(rows_of(file), None)
    return config, data, model, held_out
