"""What the user says about evaluation: batch size, length of answers, number of rows."""

from dataclasses import dataclass, fields

from fedfora.config import flag
from fedfora.data.settings import DataArguments
from fedfora.models.settings import ModelArguments


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
class PredictArguments:
    """Which adapter answers, and where the answers go."""

    model_dir: str | None = flag(None, "directory of the adapter; without it the base answers")
    output_dir: str = flag("out", "where predictions.jsonl and scores.json are written")


@dataclass(frozen=True)
class PredictSettings:
    """All settings of a prediction."""

    predict: PredictArguments
    model: ModelArguments
    data: DataArguments
    evaluation: EvalArguments


SECTIONS = {field.name: field.type for field in fields(PredictSettings)}
