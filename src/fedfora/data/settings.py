"""What the user says about data: files, columns, lengths, template."""

from dataclasses import dataclass
from typing import Literal

from fedfora.config import flag
from fedfora.data.tasks import TASKS


@dataclass
class DataArguments:
    """Which rows to read and how they become prompt and answer."""

    train_file: str | None = flag(
        None, "training rows: .json, .jsonl, .csv, .parquet, an id on the Hub, or 'clinic'"
    )
    test_file: str | None = flag(
        None, "held-out rows, never trained on; 'clinic:test' for the bundled ones", "--test_path"
    )
    dataset: str | None = flag(None, "instead of a file: a name in dataset_info.json")
    dataset_dir: str = flag("data", "directory of dataset_info.json")
    task: str = flag(
        "instruction", "kind of data: columns and a default instruction", choices=list(TASKS)
    )
    instruction_column: str = flag("instruction", "column with what to do; may be absent")
    prompt_column: str | None = flag(
        None, "column with the text to work on; may be empty; default the task's: input"
    )
    response_column: str | None = flag(
        None, "column with the answer; default the task's: output, answer_icliniq"
    )
    history_column: str | None = flag(
        None, "column with earlier [question, answer] pairs of a conversation"
    )
    source_prefix: str = flag("", "text put before every prompt")
    max_source_length: int = flag(512, "tokens kept of the prompt", "--max_src_len")
    max_target_length: int = flag(512, "tokens kept of the answer, end-of-sequence included")
    template: Literal["auto", "plain", "chat"] = flag(
        "auto", "the model's chat template, plain text, or whichever the model has"
    )
    preprocessing_num_workers: int = flag(
        1, "processes that encode the rows; worth it from some 100,000 rows on"
    )
    overwrite_cache: bool = flag(
        False, "encode the rows anew, although --cache_dir keeps them from an earlier training"
    )
    skip_bad_rows: bool = flag(False, "count and skip broken rows instead of stopping")
    canaries: int = flag(
        0, "made-up secrets to add to the training rows, which `fedfora audit` asks for afterwards"
    )
    canary_site: int = flag(0, "number of the site that trains on the canaries, counted from 0")
    canary_copies: int = flag(1, "rows that each canary makes")

    def __post_init__(self) -> None:
        """Refuse lengths that leave no room."""
        if self.max_source_length < 1:
            raise ValueError(
                f"--max_source_length must be at least 1, got {self.max_source_length}"
            )
        if self.preprocessing_num_workers < 1:
            raise ValueError(
                "--preprocessing_num_workers must be at least 1, got "
                f"{self.preprocessing_num_workers}"
            )
        for name, least in (("canaries", 0), ("canary_site", 0), ("canary_copies", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_target_length < 2:
            raise ValueError(
                "--max_target_length must be at least 2 (a token and end-of-sequence), got "
                f"{self.max_target_length}"
            )
