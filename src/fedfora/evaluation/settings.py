"""What the user says about evaluation: batches, lengths, how tokens are chosen, which scores."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fedfora.config import flag, read_yaml
from fedfora.data.settings import DataArguments
from fedfora.data.sources import rows_of
from fedfora.models.resolve import check_adapter_dir, check_named
from fedfora.models.settings import ModelArguments

MetricsChoice = Literal["auto", "triples", "text", "choice"]
METRICS_HELP = "what the answers are scored as; auto: what the references look like"
ORIGINAL_HELP = "also score as the original FoRA code did, with its faults"
OPTIONS_COLUMN = "options"


@dataclass
class EvalArguments:
    """How answers are generated and on how many rows."""

    per_device_eval_batch_size: int = flag(16, "prompts answered at a time")
    max_new_tokens: int | None = flag(
        None, "longest answer in tokens; default --max_target_length", "--max_len"
    )
    max_eval_samples: int | None = flag(None, "evaluate on the first so many rows only")

    def __post_init__(self) -> None:
        """Refuse numbers below one."""
        for name in ("per_device_eval_batch_size", "max_new_tokens", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


@dataclass
class DecodingArguments:
    """How the next token is chosen: always the likeliest, unless `--do_sample` or beams."""

    do_sample: bool = flag(False, "draw the tokens instead of taking the likeliest")
    temperature: float = flag(1.0, "with --do_sample: divides the logits")
    top_p: float = flag(1.0, "with --do_sample: draw among tokens that hold this probability")
    top_k: int = flag(0, "with --do_sample: draw among so many likeliest tokens; 0 for all")
    num_beams: int = flag(1, "beams of beam search")
    repetition_penalty: float = flag(1.0, "above 1: tokens that stand there are less likely")
    seed: int = flag(42, "seed of --do_sample and of the confidence intervals")

    def __post_init__(self) -> None:
        """Refuse what cannot work, and what would have no effect."""
        if self.temperature <= 0:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"--top_k must be at least 0, got {self.top_k}")
        if self.num_beams < 1:
            raise ValueError(f"--num_beams must be at least 1, got {self.num_beams}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"--repetition_penalty must be above 0, got {self.repetition_penalty}")
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            value = getattr(self, name)
            if not self.do_sample and value != default:
                raise ValueError(f"--{name} {value} has no effect without --do_sample")


@dataclass
class PredictArguments:
    """Which adapter answers, what is done with the answers, and where they go."""

    model_dir: str | None = flag(
        None, "directory of the adapter, which knows its base; without it the base answers"
    )
    checkpoint_dir: str | None = flag(
        None, "a checkpoint instead of the finished adapter: a path, or a name in --model_dir"
    )
    output_dir: str = flag("out/answers", "where predictions.jsonl and scores.json are written")
    overwrite_output_dir: bool = flag(False, "start over, whatever output_dir holds")
    merge: bool = flag(False, "add the adapter to the base's weights first: faster answers")
    do_eval: bool = flag(True, "score the answers of rows that have references")
    predict_with_generate: bool = flag(
        True, "write answers; without, only measure the loss of the references"
    )
    padding_side: Literal["left", "right"] = flag(
        "left", "where batches are padded; answers in batches need left"
    )
    metrics: MetricsChoice = flag("auto", METRICS_HELP)
    original_scores: bool = flag(False, ORIGINAL_HELP)
    options_column: str = flag(
        OPTIONS_COLUMN, "column with the options of a choice: a list of texts"
    )

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if not self.predict_with_generate and not self.do_eval:
            raise ValueError("nothing to do: neither --predict_with_generate nor --do_eval")


@dataclass(frozen=True)
class PredictSettings:
    """All settings of a prediction; `given` are the names of those that were said."""

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
        if predict.padding_side == "right" and predict.predict_with_generate and batch_size > 1:
            raise ValueError(
                "--padding_side right: answers are written at the end of each row, where the "
                f"padding would be (--padding_side left, or --per_device_eval_batch_size 1 "
                f"instead of {batch_size})"
            )


SECTIONS = {item.name: item.type for item in fields(PredictSettings) if item.name != "given"}


@dataclass
class AuditArguments:
    """Which run to attack, with which rows, and how hard."""

    run: str | None = flag(None, "run directory of train, simulate or demo")
    held_out_file: str | None = flag(
        None, "rows of the same kind that were not trained on; default the run's --test_file"
    )
    max_rows: int = flag(500, "rows of either kind that the membership attack looks at")
    batch_size: int = flag(16, "rows per forward pass")
    canary_alternatives: int = flag(255, "other codes that each planted canary is ranked among")
    inversion_rows: int = flag(2, "rows whose answers are read from one update; 0 for none")
    inversion_tokens: int = flag(4, "tokens of each answer that are hidden from the attacker")
    inversion_choices: int = flag(64, "tokens that the attacker chooses from in each place")
    inversion_noise: float = flag(1.0, "noise multiplier of the updates with noise")

    def __post_init__(self) -> None:
        """Refuse numbers with which an attack is none, naming the flag."""
        for name, least in (
            *(("max_rows", 1), ("batch_size", 1), ("canary_alternatives", 1)),
            *(("inversion_rows", 0), ("inversion_tokens", 1), ("inversion_choices", 2)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if not self.inversion_noise > 0:
            raise ValueError(f"--inversion_noise must be positive, got {self.inversion_noise}")


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
        raise ValueError(f"--run {arguments.run}: {path} is not that of a run: {error}") from error
    check_named(model, None)
    check_adapter_dir(arguments.run)
    held_out = arguments.held_out_file or data.test_file
    if held_out is None or data.train_file is None:
        raise ValueError("--held_out_file is missing: rows of the same kind, not trained on")
    for file in (data.train_file, held_out):
        next(rows_of(file), None)
    return config, data, model, held_out
