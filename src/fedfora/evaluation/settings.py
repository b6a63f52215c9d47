"""What the user says about evaluation: batches, lengths, how tokens are chosen, which scores."""

from dataclasses import dataclass, fields
from typing import Literal

from fedfora.config import flag
from fedfora.data.settings import DataArguments
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
        """Refuse right padding where rows of one batch are continued at their ends."""
        batch_size = self.evaluation.per_device_eval_batch_size
        predict = self.predict
        if predict.padding_side == "right" and predict.predict_with_generate and batch_size > 1:
            raise ValueError(
                "--padding_side right: answers are written at the end of each row, where the "
                f"padding would be (--padding_side left, or --per_device_eval_batch_size 1 "
                f"instead of {batch_size})"
            )


SECTIONS = {item.name: item.type for item in fields(PredictSettings) if item.name != "given"}
